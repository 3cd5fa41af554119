// Prints the JSON schemas that zod writes, as one JSON array.
import { z } from 'zod';

const Pet = z.discriminatedUnion('kind', [
  z.object({ kind: z.literal('cat'), lives: z.number().int().min(1).max(9) }),
  z.object({ kind: z.literal('dog'), name: z.string().min(1).max(8) }),
]);
const Node = z.object({
  value: z.number().int(),
  get next() {
    return Node.nullable();
  },
});
const schemas = [
  z.object({ name: z.string(), age: z.number().int().min(0).max(120), nick: z.string().optional() }),
  z.strictObject({ color: z.enum(['red', 'green']), on: z.boolean().nullable() }),
  z.object({ pet: Pet }),
  z.array(z.union([z.string().regex(/^[a-z]{2,4}$/), z.number().gte(-1).lt(3)])).min(1).max(3),
  z.tuple([z.literal('x'), z.number().int().positive().max(50)]),
  z.record(z.enum(['a', 'b']), z.boolean()),
  z.object({ at: z.iso.date(), when: z.iso.datetime(), id: z.uuid(), mail: z.email() }),
  z.object({ text: z.string().describe('Said aloud').default('hm'), more: z.string().max(5).nullish() }),
  Node,
];
console.log(JSON.stringify(schemas.map((schema) => z.toJSONSchema(schema))));
