// One more chunk of keys joins an attention output, a thread per column and query row:
// maximum, sum of weights and the unnormalised output, all float32, rescaled to the new maximum.
// The chunk's rows lie by key head first where one segment serves a whole batch.
// Template: T the chunk's output, SHARED one segment for the whole batch.
//: body
    const uint D = output_shape[1];
    const uint column = thread_position_in_grid.x;
    const uint row = thread_position_in_grid.y;
    const uint batch = dims[0];
    const uint kv_heads = dims[1];
    const uint folded = dims[2];  // query heads per key head times queries
    const uint b = row / (kv_heads * folded);
    const uint kv_head = (row / folded) % kv_heads;
    const uint chunk_row = SHARED ? (kv_head * batch + b) * folded + row % folded : row;

    const float before = maximum[row];
    const float here = chunk_maximum[chunk_row];
    const float highest = metal::max(before, here);
    const float keep = metal::precise::exp(before - highest);
    const float add = chunk_total[chunk_row] * metal::precise::exp(here - highest);
    const ulong at = static_cast<ulong>(row) * D + column;
    const float value = static_cast<float>(chunk_output[static_cast<ulong>(chunk_row) * D + column]);
    new_output[at] = output[at] * keep + value * add;
    if (column == 0) {
      new_maximum[row] = highest;
      new_total[row] = total[row] * keep + add;
    }
