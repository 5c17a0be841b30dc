"""An HTTP server with OpenAI's endpoints (extra `serve`).

app       which path does what
schemas   what may be asked, replies what is answered, errors how it is refused
service   questions for the engine: prepared, admitted, awaited
chat, completions, tokens   one endpoint's own work each
batch, batch_api, batch_runs, batch_store   OpenAI's batches
engine_thread   the one thread that steps the engine
middleware      what holds for every request: keys, sizes, times, no text in logs
server          the process: sockets, signals, how it ends
"""
