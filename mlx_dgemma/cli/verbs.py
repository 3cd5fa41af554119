"""The commands by name, and what each is for in one line."""

VERBS = {
    "generate": "one prompt, one reply, and the canvas while it resolves",
    "chat": "a conversation in the terminal",
    "infill": "fill the holes of a text, or rewrite parts of it",
    "decide": "answers to yes-or-no, choice and score questions, from one pass",
    "lora": "fine-tune a checkpoint on conversations of your own",
    "fuse": "an adapter merged into its model",
    "convert": "a checkpoint to another layout or precision",
    "server": "an OpenAI- and Anthropic-compatible endpoint on this machine",
    "benchmark": "time, memory and quality of a model on this machine",
    "evaluate": "tasks of lm-evaluation-harness, and whether two results differ",
    "doctor": "this machine: memory, what fits, kernels",
    "models": "the models on this disk and on the Hub: list, download, remove",
    "completion": "the shell's completion of these commands",
}

# Those that several processes run together where `mlx.launch` starts them.
SHARED = frozenset({"generate", "chat", "infill", "decide", "server", "benchmark", "doctor"})
