"""What a command's exit code says; 0 means it worked."""

USER_ERROR = 2  # the user can fix it: one sentence on standard error
INTERRUPTED = 130  # Ctrl-C
PIPE_CLOSED = 141  # the reader left
