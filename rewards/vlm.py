"""P(real) by an image-text model that is asked whether a picture is real or fake, as Forensic-Chat is.

    kind: rewards/vlm.py:Vlm         model: a folder or Hub repository of an AutoModelForImageTextToText
    kind: rewards/vlm.py:Endpoint    model: its name at an OpenAI-compatible server (vLLM, SGLang, ...)

The score is read off the answer's first token, not parsed from its text. With l_w the log-prob of word w,

    P(real) = sigmoid(logsumexp of l_w over spellings of `real` - logsumexp of l_w over spellings of `fake`)

which is graded where a word would be 0 or 1. RealGen has means of two logits in place of each logsumexp.
`{prompt}` in the question becomes the user's words. bench.py's judges are the same classes, by `reply`.
"""

import asyncio
import base64
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import httpx2  # what openai and huggingface_hub send their requests with
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from common import ConfigError, check_folder, load_model, loading
from reward import as_file, encode, fake_real, frozen, p_real, to_pil

QUESTION = (
    "Is this picture a photograph that a camera took, or was it made by an image generator? "
    "Answer with one word: real for a photograph, fake for a generated picture."
)


def spellings(words):
    """A word or a list -> each as written, lower, Capitalised and UPPER, with and without a leading space"""
    words = [words] if isinstance(words, str) else words
    cased = {case(word) for word in words for case in (str, str.lower, str.capitalize, str.upper)}
    return cased | {" " + word for word in cased}  # vocabularies keep "real" and " real" apart


def check_apart(real, fake):
    """ConfigError where a spelling, or its token, would count for both sides"""
    if set(real) & set(fake):
        raise ConfigError("args: real and fake share a spelling; expected other words")


# ---------------------------------------------------------------- a local model


def picture_processor(model):
    """AutoProcessor without its video part, which would need torchvision and which pictures do not"""
    stock = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(model))]
    parts = [name for name in stock.get_attributes() if "video" not in name]
    processor = type(stock.__name__, (stock,), {"get_attributes": classmethod(lambda _: parts)})
    return processor.from_pretrained(model)


class Vlm:
    """An image-text model on this machine.

    real, fake: the answers, a word or several. dtype: of the weights, float32 or bfloat16. jpeg: quality of
    a round trip of every picture, 0 for none. ConfigError: no such model, no chat template, no word that is
    one token.
    """

    def __init__(
        self, model, device="cpu", *, question=QUESTION, real="real", fake="fake", dtype="float32", jpeg=0
    ):
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"args.dtype: {dtype!r}; expected float32 or bfloat16")
        check_folder(model, "config.json")
        weights = load_model(AutoModelForImageTextToText, model, dtype=getattr(torch, dtype))
        self.model = frozen(weights, device)
        with loading(model):
            self.processor = picture_processor(model)
        if not self.processor.chat_template:
            raise ConfigError(f"{model} has no chat template; expected an instruction-tuned image-text model")
        self.processor.tokenizer.padding_side = "left"  # so that every row's last position is its last token
        self.real = self.tokens(real)
        self.fake = self.tokens(fake)
        check_apart(self.real, self.fake)
        self.question = question
        self.needs_prompt = "{prompt}" in question
        self.jpeg = jpeg

    def tokens(self, words):
        """Ids of the spellings that are one token"""
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in spellings(words)]
        found = {i[0] for i in ids if len(i) == 1} - set(tokenizer.all_special_ids)
        if not found:
            raise ConfigError(f"args: no spelling of {words!r} is one token; expected other words")
        return sorted(found)

    def inputs(self, pictures, texts):
        """B lists of PIL pictures, B texts, each pair one message of a user -> inputs of the model, padded"""
        chats = []
        for shown, text in zip(pictures, texts):
            content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": text}]
            chat = [{"role": "user", "content": content}]
            chats.append(self.processor.apply_chat_template(chat, add_generation_prompt=True))
        inputs = self.processor(text=chats, images=pictures, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def logits(self, images, prompts):
        """images (B,3,H,W), B texts -> (B, 2), [fake, real], with grad in the weights"""
        pictures = [[picture] for picture in to_pil(as_file(images, self.jpeg))]
        texts = [self.question.replace("{prompt}", prompt) for prompt in prompts]
        # the logits of one position, because those of all are gigabytes with a vocabulary of 150,000
        logits = self.model(**self.inputs(pictures, texts), logits_to_keep=1).logits[:, -1]  # (B, V)
        return fake_real(logits.float(), self.fake, self.real)

    def __call__(self, images, prompts):
        return p_real(self.logits(images, prompts))  # (B,)

    def reply(self, pictures, text):
        """The greedy answer, at most 256 tokens, to PIL pictures and a text in one message"""
        inputs = self.inputs([pictures], [text])
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=256)  # (1, L)
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


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

    seconds  for the whole of it. httpx counts from byte to byte: a server that drips would hold us for ever.
    bytes    1 MiB as they travel. Nothing is decompressed, so a small bomb stays small. An answer that is cut
             there is no JSON any more. Of an error's body nothing is read.
    headers  go out by name: the package would add the organisation, and whatever else stands in the user's
             environment. One comes in: so there is no place to be redirected to, and no cookie.
    """

    def __init__(self, seconds, headers):
        super().__init__()  # and no proxy of the environment
        self.seconds = seconds
        self.headers = headers

    async def handle_async_request(self, request):
        names = ("host", "user-agent", "content-type", "content-length")
        request.headers = httpx2.Headers({n: request.headers[n] for n in names} | self.headers)
        body = b""
        try:
            async with asyncio.timeout(self.seconds):
                response = await super().handle_async_request(request)
                async with aclosing(response.stream) as parts:
                    async for part in parts:
                        if response.status_code != 200 or len(body) > 2**20:
                            break
                        body += part
        except TimeoutError:
            raise httpx2.ReadTimeout("deadline")  # which the package knows and tries again
        wait = response.headers.get("retry-after", "")
        headers = {"content-type": "application/json", "retry-after": wait}
        return httpx2.Response(response.status_code, headers=headers, content=body)


class Endpoint:
    """A model behind base_url/chat/completions of an OpenAI-compatible server; P(real) needs its log-probs.

    key: the *name* of the environment variable that holds the API key, "" sends none. question, real, fake:
    as Vlm has them. jpeg: pictures travel as JPEG of this quality, or as PNG where it is 0. timeout: seconds
    of an attempt. retries: after 408, 409, 429, 5xx, a time-out or no connection, with the waits of openai's
    package. What then still fails raises NoAnswer. concurrency: requests at a time.
    """

    def __init__(
        self,
        model,
        device="cpu",  # as every kind has it; the server has its own
        *,
        base_url,
        key="",
        question=QUESTION,
        real="real",
        fake="fake",
        jpeg=0,
        timeout=60,
        retries=4,
        concurrency=8,
    ):
        import openai

        address = re.fullmatch(ADDRESS, base_url)
        if not address:
            raise ConfigError("args.base_url: expected http(s)://host:port/path, no user, password or query")
        self.host = address[1]
        self.name = model
        self.question = question
        self.needs_prompt = "{prompt}" in question
        self.real = spellings(real)
        self.fake = spellings(fake)
        check_apart(self.real, self.fake)
        self.jpeg = jpeg
        self.timeout = timeout
        self.concurrency = concurrency
        http = httpx2.AsyncClient(transport=Bounded(timeout, authorization(key)), follow_redirects=False)
        options = dict(max_retries=retries, timeout=timeout, http_client=http)
        self.client = openai.AsyncOpenAI(base_url=base_url, api_key="none", **options)
        # asyncio, because it can give up a request at any point; a thread that waits for a socket cannot
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def ask(self, read, pictures, text, **options):
        """PIL pictures and a text in one message -> read(first choice of the answer). Threads may call it."""
        import openai

        kind = "jpeg" if self.jpeg else "png"
        content = []
        for picture in pictures:
            data = base64.b64encode(encode(picture, self.jpeg)).decode()
            url = {"url": f"data:image/{kind};base64,{data}"}
            content.append({"type": "image_url", "image_url": url})
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        request = self.client.chat.completions.create(model=self.name, messages=messages, **options)
        try:
            return read(asyncio.run_coroutine_threadsafe(request, self.loop).result().choices[0])
        except openai.APIStatusError as error:
            cause = f"HTTP {error.status_code}"
        except openai.APITimeoutError:
            cause = f"no answer within {self.timeout:g} seconds"
        except openai.APIConnectionError:
            cause = "no connection"
        except Exception as error:  # what a server may send in place of an answer has no common kind
            cause = f"unreadable answer ({type(error).__name__})"
        # not in the clauses above: what they caught would be chained to it
        raise NoAnswer(f"{self.host}, model {self.name}: {cause}")

    def map(self, function, *items):
        """function of each item, in order, `concurrency` of them at a time; the first exception ends it"""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(function, *items))

    def read_real(self, choice):
        """P(real) from the likeliest first tokens; a side that is not listed counts as the least of them"""
        listed = choice.logprobs.content[0].top_logprobs
        log_probs = torch.tensor([[token.logprob for token in listed]])  # (1, 20)
        words = [token.token.strip().lower() for token in listed]
        real = [i for i, word in enumerate(words) if word in self.real]
        fake = [i for i, word in enumerate(words) if word in self.fake]
        if not real + fake:
            raise LookupError("neither real nor fake")  # and not 0.5, which would look like a score
        least = [log_probs.argmin().item()]
        return p_real(fake_real(log_probs, fake or least, real or least)).item()

    def __call__(self, images, prompts):
        options = dict(max_tokens=1, temperature=0, logprobs=True, top_logprobs=20)

        def ask(picture, prompt):
            return self.ask(self.read_real, [picture], self.question.replace("{prompt}", prompt), **options)

        return torch.tensor(self.map(ask, to_pil(images), prompts))  # (B,)

    def reply(self, pictures, text, **options):
        """The answer to PIL pictures and a text in one message, at most 4,000 characters

        options: as max_tokens=256, which is not sent by default: OpenAI's reasoning models refuse it.
        """

        def read_text(choice):
            text = (choice.message.content or "")[:4000]
            return text.encode(errors="replace").decode()  # lone surrogates could not be written to a file

        return self.ask(read_text, pictures, text, **options)
