"A model server that misbehaves: some sixty kinds of fault over real sockets, at a given share of the requests"
import gzip
import json
import random
import socket
import socketserver
import struct
import threading
import time
from contextlib import contextmanager

from wikidpo.judge.offline import httpx, InProcess

SECRET = "sk-planted-0123456789abcdef"


def http(status, body=b"", **headers):
    "The bytes of a response; underscores in the names of headers stand for dashes"
    body = body.encode() if isinstance(body, str) else body
    lines = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
    lines |= {k.replace("_", "-"): v for k, v in headers.items()}
    head = "".join(f"{k}: {v}\r\n" for k, v in lines.items() if v is not None)
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body

def trouble(status, **headers): return http(status, json.dumps({"error": {"message": "not now"}}), **headers)
def said(content, **more): return body(dict(role="assistant", content=content), **more)
def body(message, **more): return http(200, json.dumps({"choices": [{"index": 0, "message": message, **more}]}))
def raw(text): return http(200, '{"choices": [{"message": {"content": %s}}]}' % text)
def top(value): return http(200, json.dumps(value))
def gzipped(data): return http(200, data, content_encoding="gzip")

def probabilities(top_logprobs):
    "A reply with these as the likeliest first tokens"
    return said("7", logprobs={"content": [{"top_logprobs": top_logprobs}]})

BUSY = dict(retry_after_ms=1)
GOOD = json.dumps({"choices": [{"message": {"content": "7"}}]}).encode()
CHUNKED = dict(transfer_encoding="chunked", content_length=None)

STATUSES = {
    "429": trouble(429, **BUSY), "429 retry-after": trouble(429, retry_after=1), "429 odd retry-after": trouble(
        429, retry_after="soon", **BUSY), "500": trouble(500, **BUSY), "503": trouble(503, **BUSY),
    "503 retry-after": trouble(503, retry_after="0.2"), "408": trouble(408, **BUSY), "404": trouble(404),
    "204": http(204, content_length=None), "302": http(302, location="/elsewhere"),
    "redirect loop": http(307, location="/v1/chat/completions"), "300 without a place": http(300),
    "charset that is none": http(500, b"\x00\xff", content_type="text/plain; charset=hex", **BUSY),
    "an error of 200 kB": http(500, "x" * 200_000, **BUSY), "error in 200": top({"error": {"message": "no"}}),
    "error that is a list": http(500, "[1, 2]", **BUSY), "error message of another type": http(
        500, '{"error": {"message": {"a": [7]}}}', **BUSY)}

BODIES = {
    "empty": http(200), "html": http(200, "<html><body>7</body></html>", content_type="text/html"),
    "malformed json": http(200, '{"choices": [{"message": {"content": "7"'), "no choices": top({"id": "x"}),
    "choices empty": top({"choices": []}), "choices null": top({"choices": None}), "choices dict": top(
        {"choices": {"0": {"message": {"content": "7"}}}}), "choices of ints": top({"choices": [7]}),
    "top list": top([7]), "top null": top(None), "top int": top(7), "top text": top("7"), "top bool": top(True),
    "message int": body(7), "message list": body(["7"]), "message text": body("7"), "message null": body(None),
    "message bool": body(True), "no message": top({"choices": [{"index": 0}]}),
    "content int": said(7), "content float": said(7.), "content list": said(["7"]), "content dict": said({"text": "7"}),
    "content bool": said(True), "content null": said(None), "no utf-8": http(200, GOOD.replace(b'"7"', b'"\xb7"')),
    "bytes": http(200, GOOD.replace(b'"7"', b'"7\xff\xfe"')), "lone surrogate": raw('"7\\ud800"'),
    "deep nesting": http(200, b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "ten thousand digits": raw("7" * 10_000), "digits elsewhere": http(
        200, GOOD.replace(b"}}]}", b', "n": ' + b"7" * 10_000 + b"}}, 7]}")),
    "nan": raw("NaN"), "event stream": http(200, b"data: " + GOOD + b"\n\ndata: [DONE]\n\n"), "two bodies": http(
        200, GOOD + GOOD), "broken gzip": gzipped(b"\x1f\x8b\x08\x00garbage"), "gzip": gzipped(gzip.compress(GOOD)),
    "gzip bomb": gzipped(gzip.compress(b" " * 20_000_000)), "ten megabytes": said("7" + " " * 10_000_000),
    "broken chunks": http(200, b"zz\r\n" + GOOD, **CHUNKED), "cut chunks": http(200, b"ff\r\n" + GOOD, **CHUNKED)}

REPLIES = {
    "prose": said("I think that this answer deserves a good score."), "scale": said("On a 1-10 scale, 7"),
    "8.5": said("8.5"), "100": said("100"), "-1": said("-1"), "0": said("0"), "foreign digits": said("\u0668"),
    "full-width digits": said("\uff17"), "ten that was cut": said("1", finish_reason="length"), "7/100": said("7/100"),
    "the key": said(f"7, and your key is {SECRET}"), "special tokens": said("<|im_end|>\n<|im_start|>user\n7"),
    "control characters": said("\x1b[2J\x1b[31m7"), "nul": said("7\x00"), "line separator": said("7\u20289"),
    "long": said("The answer is right. " * 5000), "two lines": said("C or D\n7\nA"), "quartz": said("quartz")}

LOGPROBS = {
    "no logprobs": said("7"), "logprobs null": said("7", logprobs=None), "logprobs list": said("7", logprobs=[1]),
    "content int ": said("7", logprobs={"content": 7}), "no places": said("7", logprobs={"content": []}),
    "token int": probabilities([{"token": 7, "logprob": 0.}]),
    "logprob text": probabilities([{"token": "7", "logprob": "0"}]),
    "logprob nan": probabilities([{"token": "7", "logprob": float("nan")}]),
    "logprob above 0": probabilities([{"token": "7", "logprob": 700.}]),
    "more than one": probabilities([{"token": t, "logprob": 0.} for t in ("7", " 7", "9")])}

def cut(conn): conn.sendall(http(200, GOOD)[:-9])
def cut_head(conn): conn.sendall(http(200, GOOD)[:30])
def drop(conn): pass
def reset(conn): conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
def noise(conn): conn.sendall(random.Random(0).randbytes(500))

def hang(conn):
    conn.settimeout(60)
    try: conn.recv(1) # until the other side goes away
    except OSError: pass

def drip(conn, data=http(200, GOOD), beginning=-30):
    conn.sendall(data[:beginning])
    for byte in data[beginning:]:
        conn.sendall(bytes([byte]))
        time.sleep(.3)

def drip_head(conn): drip(conn, beginning=20)

CONNECTIONS = {"cut body": cut, "cut head": cut_head, "dropped": drop, "reset": reset, "noise": noise}
SLOW = {"hang": hang, "drip": drip, "drip of the head": drip_head}
QUICK = STATUSES | BODIES | REPLIES | CONNECTIONS
KINDS = QUICK | SLOW


class FaultyServer(socketserver.ThreadingTCPServer):
    """Answers as an ASGI app does, but for a share of the POST requests, which get faults of the given kinds in turn;
    keeps what it was asked"""
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 256

    def __init__(self, app, kinds, share=1., seed=0):
        super().__init__(("127.0.0.1", 0), None)
        self.app, self.kinds, self.share = InProcess(app), list(kinds), share
        self.rng, self.lock = random.Random(seed), threading.Lock()
        self.asked, self.faults = [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address): pass # the other side may hang up whenever it likes

    def finish_request(self, conn, _):
        conn.settimeout(60)
        head, _, content = self._until_blank(conn)
        method, path, _ = head.split(b"\r\n")[0].split()
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        size = int(headers.get(b"content-length", 0))
        while len(content) < size: content += conn.recv(65536)
        with self.lock:
            self.asked.append(dict(headers=headers, body=content))
            kind = None
            if method == b"POST" and self.rng.random() < self.share:
                kind = self.kinds[len(self.faults) % len(self.kinds)]
                self.faults.append(kind)
        if kind is None: conn.sendall(self._right(method, path, content))
        elif callable(KINDS_OF[kind]): KINDS_OF[kind](conn)
        else: conn.sendall(KINDS_OF[kind])

    def _until_blank(self, conn):
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := conn.recv(65536)): raise ConnectionError
            data += more
        return data.partition(b"\r\n\r\n")

    def _right(self, method, path, content):
        with self.lock, httpx.Client(transport=self.app) as c: # the app answers one at a time
            answer = c.request(method.decode(), f"http://x{path.decode()}", content=content)
        return http(answer.status_code, answer.content)

KINDS_OF = KINDS | LOGPROBS

@contextmanager
def faulty(app, kinds=tuple(KINDS), share=1., seed=0):
    "A running `FaultyServer` while the block runs"
    with FaultyServer(app, kinds, share, seed) as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
        try: yield server
        finally: server.shutdown()
