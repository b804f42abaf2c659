"""What crosses between an owner and the server: frames, codecs, tokens, the stream, messages.

Strategies and owners are peers; they meet here and nowhere else.
"""
