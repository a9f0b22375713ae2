"""Serving: an OpenAI-compatible endpoint for a run or an export, with continuous batching by transformers.

requests          what clients may ask, and the errors that they get
sampling          the next tokens of a batch, each by its own request's settings and seed
engine            the requests in one model: those that are computed together, and those that wait
text              from tokens to text, up to a stop sequence
answers           choices of a request, whole or as they are made
application       the HTTP application
metrics           the metrics of a server
server            listens until it is asked to stop
commands          `serve` on the command line
"""
