"""Fine-tuning: a data folder and a checkpoint become an adapter.

data      JSONL files to token ids          batches  ids to padded, noised batches, by seed
forward   both passes over a batch          loss     the objective, over the vocabulary in chunks
tuning    LoRA, DoRA or full parameters     loop     steps, evaluation, saves and resuming
plan      memory before the first step
"""
