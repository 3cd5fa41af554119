"""Messages, images and tools become token ids; committed ids become text again."""
