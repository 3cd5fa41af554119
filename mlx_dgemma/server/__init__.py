"""The local HTTP server: OpenAI's and Anthropic's request shapes over one Runtime.

app           routes, keys, limits, one shape for every error
engine        admits requests, hands them to the model's thread, frees what they held
chat completions responses messages      one endpoint each
sampling replies streams fields          what the endpoints share
"""
