"""Client of an Ollama server.

In: a host, names of models, conversations. Out: answers, greedy traces, the list of the server's models; errors with
the next step.

client    the HTTP API: models, blobs, streams, and the mapping of errors
address   OLLAMA_HOST and --host, as a URL
transport the connections: limits of time and size, no key, no redirects
answers   the answers of the API as strict models
protocol  plain values of the API, without a connection: versions, parameters, lines, error texts
health    state of a server: address, version, GPU
prompts   the rendered prompts, compared with those of training
engine    one model of the server as an `Engine`
trace     greedy traces
served_model  whether a model on the server is what was sent: its description, one answer and its thought

Does not decide which model is published or promoted (serving/ does), and does not install or start a server.
"""
