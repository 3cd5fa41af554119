"""What a model costs on a machine: counted, timed, and beside what the chip could do."""
