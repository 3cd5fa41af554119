"""Messages, images and tools become token ids; committed ids become text again."""

from mlx_dgemma.prompt.chat_template import encode_messages
from mlx_dgemma.prompt.reply import ReplyReader
from mlx_dgemma.prompt.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ReplyReader", "Tokenizer", "encode_messages", "load_tokenizer"]
