"""P(real) by an image-text model that is asked whether a picture is real or fake, as Forensic-Chat is.

    kind: rewards/vlm.py:Vlm         model: a folder or Hub repository of an AutoModelForImageTextToText
    kind: rewards/vlm.py:Endpoint    model: its name at an OpenAI-compatible server (vLLM, SGLang, ...)

The score is read off the answer's first token, not parsed from its text, so it is graded where a word would
be 0 or 1. A local model gives Forensic-Chat's reward (RealGen, arXiv 2512.00473). With z logits of tokens,

    P(real) = sigmoid((z[real] + z[Real]) / 2 - (z[fake] + z[Fake]) / 2)

A server tells the probabilities p of its 20 likeliest tokens alone, among which these four need not be. There

    P(real) = R / (R + F)    R: sum of p over `real` and `Real`, F: over `fake` and `Fake`

with or without a space around them. The wording of the question is ours. bench.py's judges are the same
classes, by `reply`.
"""

import asyncio
import base64
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial

import httpx2  # what openai and huggingface_hub send their requests with
import openai
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from common import ConfigError, check_folder, loading
from reward import encode, load_frozen, p_real, to_pil

QUESTION = (
    "Look closely at light, surfaces, edges and anatomy. Did a camera take this picture, or did AI generate "
    "it? The first word of your answer is real for a photograph or fake for a generated picture; reasons "
    "come after it."
)


@dataclass(kw_only=True)
class Asked:
    """What either kind is asked, and the answers that count. ConfigError: real and fake are one word."""

    question: str = QUESTION  # {prompt} in it becomes the user's words
    real: str = "real"  # the answer; it counts in lower case and capitalised
    fake: str = "fake"

    def __post_init__(self):
        self.needs_prompt = "{prompt}" in self.question
        self.words = [{word.lower(), word.capitalize()} for word in (self.fake, self.real)]
        if set.intersection(*self.words):
            raise ConfigError("args: real and fake are the same word; expected two")

    def questions(self, images, prompts):
        """images (B,3,H,W), B texts -> B lists of one PIL picture, B questions"""
        pictures = [[picture] for picture in to_pil(images)]
        return pictures, [self.question.replace("{prompt}", prompt) for prompt in prompts]

    def sides(self, tokens):
        """Texts of tokens -> [numbers of those that say `fake`, numbers of those that say `real`]"""
        return [[i for i, word in enumerate(tokens) if word in words] for words in self.words]


def message(kind, shown, text):
    """Pictures, in the form of their kind, and a text -> a chat of one message"""
    content = [{"type": kind, kind: picture} for picture in shown]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


# ---------------------------------------------------------------- a local model


def picture_processor(model, config):
    """AutoProcessor without its video part, which would need torchvision and which pictures do not"""
    stock = PROCESSOR_MAPPING[type(config)]
    parts = [name for name in stock.get_attributes() if "video" not in name]
    processor = type(stock.__name__, (stock,), {"get_attributes": classmethod(lambda _: parts)})
    return processor.from_pretrained(model)


@dataclass
class Vlm(Asked):
    """An image-text model on this machine.

    ConfigError: no such model or dtype, a word that is not one token, both in lower case and capitalised.
    """

    model: InitVar[str]
    device: InitVar[str] = "cpu"
    _: KW_ONLY
    dtype: str = "float32"  # of the weights; bfloat16 takes half the memory

    def __post_init__(self, model, device):
        super().__post_init__()
        check_folder(model, "config.json")
        self.model = load_frozen(AutoModelForImageTextToText, model, device, dtype=self.dtype)
        with loading(model):
            self.processor = picture_processor(model, self.model.config)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # so that every row's last position is its last token
        # [[fake, Fake], [real, Real]]
        self.columns = self.sides(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
        if {*map(len, self.columns)} != {2}:
            raise ConfigError("args: real, fake: expected words of one token, in lower case and capitalised")

    def inputs(self, pictures, texts):
        """B lists of PIL pictures, B texts, each pair one message of a user -> inputs of the model, padded"""
        chats = [message("image", shown, text) for shown, text in zip(pictures, texts)]
        inputs = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
        return inputs.to(self.model.device, self.model.dtype)

    def logits(self, images, prompts):
        """images (B,3,H,W), B texts -> (B, 2), [fake, real], with grad in the weights"""
        inputs = self.inputs(*self.questions(images, prompts))
        # the logits of one position, because those of all are gigabytes with a vocabulary of 150,000
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()  # (B, V)
        return logits[:, self.columns].mean(-1)  # (B, 2, 2), then (B, 2)

    def __call__(self, images, prompts):
        return p_real(self.logits(images, prompts))  # (B,)

    def reply(self, pictures, text):
        """The greedy answer, at most 256 tokens, to PIL pictures and a text in one message"""
        inputs = self.inputs([pictures], [text])
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=256)  # (1, L)
        return self.processor.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- a server

# http(s)://host:port/path, and no user, password or query: what they hold would end up in logs
ADDRESS = r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d+)?(/[^\s?#@\\]*)?"


class NoAnswer(Exception):
    """What is left when retries are spent: host, model and cause; never a server's words, a key or a path."""


def authorization(variable):
    """The header with the API key that an environment variable holds; none for "".

    No message shows either of them: a key that was put where its variable's name belongs would be printed.
    """
    if not variable:
        return {}
    key = os.environ.get(variable, "")
    if not re.fullmatch("[!-~]+", key):  # what may stand in a header
        raise ConfigError("args.key: expected the name of a variable that is set to a key, one ASCII word")
    return {"authorization": f"Bearer {key}"}


class Bounded(httpx2.AsyncHTTPTransport):
    """One request and its answer, within bounds that the openai package leaves open.

    headers  go out by name: the package would add the organisation, and whatever else stands in the user's
             environment. One comes in: so there is no place to be redirected to, and no cookie.
    bytes    1 MiB as they travel. Nothing is decompressed, so a small bomb stays small. An answer that is cut
             there is no JSON any more. Of an error's body nothing is kept.
    """

    def __init__(self, headers):
        super().__init__()  # and no proxy of the environment
        self.headers = headers

    async def handle_async_request(self, request):
        names = ("host", "user-agent", "content-type", "content-length")
        request.headers = httpx2.Headers({n: request.headers[n] for n in names} | self.headers)
        response = await super().handle_async_request(request)
        body = b""
        async for part in response.stream:
            if response.status_code != 200 or len(body) > 2**20:
                break
            body += part
        await response.aclose()
        headers = {"content-type": "application/json", "retry-after": response.headers.get("retry-after", "")}
        return httpx2.Response(response.status_code, headers=headers, content=body)


@dataclass
class Endpoint(Asked):
    """A model behind base_url/chat/completions of an OpenAI-compatible server; P(real) needs its log-probs.

    Asks again after 408, 409, 429, 5xx, a time-out or no connection, with the waits of openai's package. What
    then still fails raises NoAnswer.
    """

    model: str
    device: str = "cpu"  # as every kind has it; the server has its own
    _: KW_ONLY
    base_url: str
    key: str = ""  # *name* of the environment variable that holds the API key; "" sends none
    timeout: float = 60  # seconds that an attempt may be silent, and a question has for each attempt
    retries: int = 4
    concurrency: int = 8  # requests at a time

    def __post_init__(self):
        super().__post_init__()
        address = re.fullmatch(ADDRESS, self.base_url)
        if not address:
            raise ConfigError("args.base_url: expected http(s)://host:port/path, no user, password or query")
        self.host = address[1]
        self.client = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key="none",  # Bounded has the key
            max_retries=self.retries,
            timeout=self.timeout,
            http_client=httpx2.AsyncClient(transport=Bounded(authorization(self.key))),
        )
        # asyncio, because it can give up a request at any point; a thread that waits for a socket cannot
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def ask(self, read, pictures, text, **options):
        """PIL pictures and a text in one message -> read(first choice of the answer); threads may call it"""
        files = [base64.b64encode(encode(picture, 0)).decode() for picture in pictures]  # PNG
        chat = message("image_url", [{"url": f"data:image/png;base64,{file}"} for file in files], text)
        request = self.client.chat.completions.create(model=self.model, messages=chat, **options)
        # httpx counts from byte to byte: a server that drips would hold us for ever
        bounded = asyncio.wait_for(request, self.timeout * (1 + self.retries))
        try:
            return read(asyncio.run_coroutine_threadsafe(bounded, self.loop).result().choices[0])
        except Exception as error:  # what a server may send in place of an answer has no common kind
            status = getattr(error, "status_code", "")
            cause = f"HTTP {status}" if status else type(error).__name__
        # not in the clause above: what it caught, a server's words among it, would be chained to this
        raise NoAnswer(f"{self.host}, model {self.model}: no answer that can be read: {cause}")

    def map(self, function, *items):
        """function of each item, in order, `concurrency` of them at a time; the first exception ends it"""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(function, *items))

    def read_real(self, choice):
        """P(real) from the likeliest first tokens; a side that is not listed counts as the least of them"""
        listed = choice.logprobs.content[0].top_logprobs
        p = [math.exp(token.logprob) for token in listed]
        sides = self.sides([token.token.strip() for token in listed])
        if not any(sides):
            raise LookupError("neither real nor fake")  # and not 0.5, which would look like a score
        fake, real = (sum(p[i] for i in side) or min(p) for side in sides)
        return real / (real + fake)

    def __call__(self, images, prompts):
        ask = partial(self.ask, self.read_real, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20)
        return torch.tensor(self.map(ask, *self.questions(images, prompts)))  # (B,)

    def reply(self, pictures, text):
        """The answer to PIL pictures and a text in one message, at most 4,000 characters

        Its length is not asked for: OpenAI's reasoning models refuse max_tokens.
        """
        return self.ask(lambda choice: (choice.message.content or "")[:4000], pictures, text)
