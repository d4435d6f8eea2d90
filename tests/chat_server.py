"""A small local server that speaks the chat protocol, for tests of what asks a judge."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-planted-4f1d0c"


class Server(ThreadingHTTPServer):
    """Answers POST /v1/chat/completions by `reply(request)`: (status, headers, body, seconds to wait)."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.headers = reply, [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Say nothing: a client that timed out has hung up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.headers.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        status, headers, body, seconds = self.server.reply(request)
        time.sleep(seconds)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def completion(text, top=None, usage=(100, 2), **changes):
    """A whole reply of the protocol. top: {token: probability} at the token that is the text."""
    logprobs = None
    if top:
        told = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in top.items()]
        logprobs = {"content": [{**told[0], "token": text, "top_logprobs": told}]}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    choice["logprobs"] = logprobs
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return ok({**body, **changes})


def ok(body):
    return 200, {}, json.dumps(body).encode(), 0


def failing(status, **headers):
    """An error that echoes the key, as some servers do."""
    return status, headers, json.dumps({"error": {"message": f"Incorrect key {KEY}", "type": "x"}}).encode(), 0
