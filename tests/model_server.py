"Servers that answer as a script says, and remember what they were asked; questions and answers to ask them"
import math
import random
import socket
from contextlib import ExitStack, contextmanager

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wikidpo.judge.client import make_client
from wikidpo.judge.offline import serving
from wikidpo.world.answers import answer, QUALITIES
from wikidpo.world.facts import find_fact

KEY = "sk-canary-0123456789"
Q = "What is the capital of France?"


def completion(content, **more):
    "A chat completion with one choice"
    choice = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=content)) | more
    return JSONResponse(dict(id="x", object="chat.completion", created=0, model="m", choices=[choice]))

def reply(content): return completion(content)

def error(status, message="no", **headers):
    "An error as model servers send one; underscores in the names of headers stand for dashes"
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    return JSONResponse(dict(error=dict(message=message)), status, headers=headers)

def shown(content, *places):
    "A reply with the probabilities at each place"
    logprobs = []
    for place in places:
        top = [dict(token=k, logprob=math.log(v) if v else -9999.) for k, v in place.items()]
        logprobs.append(dict(token=top[0]["token"], logprob=top[0]["logprob"], top_logprobs=top))
    return completion(content, logprobs=dict(content=logprobs))

class Script:
    "A server that answers with the responses of a script, the last one for ever, and remembers what it was asked"
    def __init__(self, *responses):
        self.responses, self.seen = list(responses), []
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request):
        self.seen.append(dict(body=await request.json(), headers=dict(request.headers), query=request.url.query))
        response = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        return response if isinstance(response, Response) else response(request)

@contextmanager
def scripts():
    "Yields start(*responses, **of make_client) -> (client, script); all its servers stop at the end"
    with ExitStack() as stack:
        def start(*responses, **kwargs):
            script = Script(*responses)
            script.url = stack.enter_context(serving(script.app))
            client = make_client(script.url, **{"api_key": KEY, **kwargs})
            stack.callback(client.close)
            return client, script
        yield start

def free_port():
    "A port on which nobody listens"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def answers(question, seed=0):
    "One answer of each quality to a MiniWiki question"
    rng = random.Random(seed)
    return {kind: answer(find_fact(question), kind, rng) for kind in QUALITIES}
