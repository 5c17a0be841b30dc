"""An HTTP server with OpenAI's endpoints (extra `serve`).

app       maps paths to endpoints
schemas   the bodies of requests; replies those of replies, errors those of errors
service   prepares jobs for the engine, admits them and waits for them
chat, completions, tokens   the endpoints
batch, batch_api, batch_runs, batch_store   OpenAI's batches
engine_thread   the only thread that steps the engine
middleware      checks every request: keys, sizes, times, no text in logs
server          the process: sockets, signals, exit
"""
