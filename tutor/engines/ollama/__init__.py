"""Client of an Ollama server.

In: a host, names of models, conversations. Out: answers, greedy traces, and the models that the server has; errors
with the next step.

client    the HTTP API: models, blobs, streams, and the mapping of errors
protocol  plain values of the API, without a connection: hosts, versions, parameters, events, error texts
engine    one model of the server as an `Engine`
trace     greedy traces

What is published and promoted is decided in serving/; no server is installed or started here.
"""
