"""The local HTTP server: OpenAI's and Anthropic's request shapes over one Runtime.

app           routes, keys, limits, one shape for every error
engine        admits requests, hands them to the model's thread, frees what they held
chat completions responses messages      one endpoint each
requests sampling fields                 what they read the same way
choices replies segments streams drafts  what they answer the same way
tool_choice structured validation        replies that must have a form: languages and checks
prefix_cache disk_cache                  contexts that conversations share
"""
