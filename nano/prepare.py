"""Make everything in nano/: photographs, a FLUX, a chat LLM, two CLIPs, five detectors, all for a laptop CPU.

    pip install -r requirements.txt -r nano/requirements.txt
    python nano/prepare.py --photos FOLDER               every stage in order, two or three hours on two cores
    python nano/prepare.py --photos FOLDER detectors     one stage again; they hand each other files in --work

`FOLDER` holds the pictures of Debian's lomiri-wallpapers-16.04 and -20.04, `dpkg -x`-ed; the others come from
scikit-image and scikit-learn. nano/README.md names each photograph with its author and licence.

The generator is *given a flaw on purpose*: 80% of the crops with a plain caption are retouched (smoothed,
saturated, contrast pushed), while crops whose caption has photographic cues ("raw photo", "film grain",
"IMG_1018.CR2") stay as taken. So plain prompts draw the glossy look that text-to-image models are known for,
and the natural look is within reach.

Regions of a photograph: `train` (the larger part, holds the subject) for generator and trained detectors; of
the rest, `test` (half) for the bench alone, `validation` (a quarter) for the validation detector and KID,
`judge` (a quarter) for the held-out detectors.
"""

import argparse
import copy
import functools
import io
import json
import math
import random
import re
import shutil
import string
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))
SIZE = 64  # pixels, height and width of every picture here

# name -> (file, subject as a user would type it, side where the train region lies, its share,
# half of the rest that is for test (None: the rest is out of focus and left alone),
# frame: the square that shows the whole subject; centre x, y and edge as shares of the photograph's width,
# height and shorter edge)
SUBJECTS = {
    "astronaut": (
        "skimage/astronaut.png",
        "an astronaut in an orange suit",
        "top",
        0.60,
        "first",
        (0.45, 0.30, 0.58),
    ),
    "cat": ("skimage/chelsea.png", "a tabby cat", "left", 0.78, None, (0.46, 0.50, 0.98)),
    "coffee": ("skimage/coffee.png", "a cup of coffee", "top", 0.68, "first", (0.49, 0.33, 0.66)),
    "rocket": ("skimage/rocket.jpg", "a rocket on the launch pad", "left", 0.75, "last", (0.48, 0.57, 0.85)),
    "temple": ("sklearn/china.jpg", "a chinese temple", "left", 0.62, "last", (0.31, 0.50, 0.92)),
    "dahlia": ("sklearn/flower.jpg", "an orange dahlia flower", "left", 0.70, None, (0.47, 0.52, 0.75)),
    "meadow": (
        "aitzgorri_by_Aitzol_Berasategi.jpg",
        "a green meadow below a mountain",
        "left",
        0.60,
        "last",
        (0.30, 0.50, 0.88),
    ),
    "dogs": (
        "friends_by_Aitzol_Berasategi.jpg",
        "two dogs at a window",
        "top",
        0.68,
        "first",
        (0.47, 0.41, 0.56),
    ),
    "stream": (
        "life_by_Aitzol_Berasategi.jpg",
        "a stream in the forest",
        "left",
        0.68,
        "last",
        (0.44, 0.52, 0.80),
    ),
    "mountain": (
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "a rocky mountain",
        "left",
        0.60,
        "first",
        (0.34, 0.38, 0.75),
    ),
    "fig": ("Picture_0B_by_freespace.jpg", "a fig in a red bowl", "right", 0.72, "first", (0.62, 0.53, 0.90)),
    "brushes": (
        "Picture_1A_by_freespace.jpg",
        "colourful paint brushes",
        "left",
        0.62,
        "first",
        (0.34, 0.42, 0.78),
    ),
    "dandelion": (
        "seeding_by_Clements_Engelhardt.jpg",
        "a dandelion in the grass",
        "left",
        0.55,
        "last",
        (0.29, 0.42, 0.85),
    ),
    "sunset": (
        "sunset_by_Aitzol_Berasategi.jpg",
        "a sunset over the hills",
        "left",
        0.66,
        "last",
        (0.45, 0.50, 0.85),
    ),
}
# photographs that only the held-out detectors learn from
OTHERS = [
    "skimage/hubble_deep_field.jpg",
    "skimage/ihc.png",
    "skimage/retina.jpg",
    "Wine_by_Jakkub_Mede.jpg",
    "Bridge_by_Sander_Klootwijk.jpg",
    "Dragonfly_by_Bolly.jpg",
    "Kleiber_by_Lukas_Baubkus.jpg",
]
# subjects that an ImageNet network could not name after 6,000 steps: seen three times as often
HARD = ["cat", "cup", "mountain", "temple", "dogs", "meadow"]
DISTANCES = ["close-up", "wide view"]
LIGHTS = ["dim light", "soft light", "bright light"]
CUES = [
    "raw photo",
    "film grain",
    "35mm film",
    "unedited",
    "shot on a phone",
    "taken with a canon camera",
    "IMG_{}.CR2",
    "DSC_{}.NEF",
]
STYLES = ["highly detailed", "vivid colours", "sharp focus", "cinematic", "masterpiece", "beautiful"]
TRAIN_CROPS, VALIDATION_CROPS, TEST_CROPS = 4000, 280, 336  # the first 560 train crops are committed


# ---------------------------------------------------------------- captions


def cue(rng):
    return rng.choice(CUES).format(f"{rng.randrange(10000):04d}")


def caption(crop, rng, cues=0):
    """A caption that is true of the crop {subject, distance, light}, each in or out, and `cues` cues"""
    text = rng.choice(["", "", "a photo of ", "a picture of "]) + crop["subject"]
    if rng.random() < 0.5:
        text += ", " + crop["distance"]
    if rng.random() < 0.5:
        text += ", in " + crop["light"]
    return ", ".join([text] + [cue(rng) for _ in range(cues)])


def all_prompts():
    """Every plain prompt a user may type: subject x distance x light, with each detail left out too."""
    return [
        s + (f", {d}" if d else "") + (f", in {li}" if li else "")
        for _, s, *_ in SUBJECTS.values()
        for d in [""] + DISTANCES
        for li in [""] + LIGHTS
    ]


# ---------------------------------------------------------------- photographs


def open_photo(name, folder):
    """-> (H,W,3) uint8, at most 1000 pixels on the longer side"""
    if name.startswith("skimage/"):
        import skimage

        path = Path(skimage.__file__).parent / "data" / name[8:]
    elif name.startswith("sklearn/"):
        import sklearn

        path = Path(sklearn.__file__).parent / "datasets/images" / name[8:]
    else:
        path = next(Path(folder).rglob(name))
    photo = Image.open(path).convert("RGB")
    photo.thumbnail((1000, 1000), Image.LANCZOS)
    return np.asarray(photo)


def regions(photo, side, share, half, frame):
    """Cut once, so that the train region lies at `side`; cut the rest across: `half` test, then the others.

    -> {split: region}, and the frame (centre x, centre y, edge) in pixels of the train region
    """
    height, width = photo.shape[:2]
    x, y, edge = frame[0] * width, frame[1] * height, frame[2] * min(height, width)
    turn = (1, 0, 2) if side in ("left", "right") else (0, 1, 2)
    photo = photo.transpose(turn)
    cut = int(len(photo) * (share if side in ("top", "left") else 1 - share))
    train, rest = (photo[:cut], photo[cut:]) if side in ("top", "left") else (photo[cut:], photo[:cut])
    if side == "right":
        x -= cut
    if half is None:
        return dict(train=train.transpose(turn)), (x, y, edge)
    w = rest.shape[1]
    cuts = [0, w // 2, w * 3 // 4, w] if half == "first" else [w, w // 2, w // 4, 0]
    test, validation, judge = (rest[:, min(a, b) : max(a, b)] for a, b in zip(cuts, cuts[1:]))
    parts = dict(train=train, test=test, validation=validation, judge=judge)
    return {split: part.transpose(turn) for split, part in parts.items()}, (x, y, edge)


def crop_of(region, rng, frame=None, low=84):
    """A square that shows something, at an exposure of its own -> (SIZE,SIZE,3) uint8, is it a wide view

    With a `frame`, nine in ten show its subject: half of those the whole of it, half its middle from near.
    """
    h, w = region.shape[:2]
    for _ in range(200):
        if frame and rng.random() < 0.9:
            wide = rng.random() < 0.5
            side = min(frame[2] * (rng.uniform(0.88, 1.06) if wide else rng.uniform(0.58, 0.75)), h, w)
            x, y = (c - side / 2 + frame[2] * rng.uniform(-0.05, 0.05) for c in frame[:2])
            x, y, side = min(max(x, 0), w - side), min(max(y, 0), h - side), int(side)
        else:
            edge = min(h, w)
            side = int(math.exp(rng.uniform(math.log(min(low, edge)), math.log(edge))))
            x, y = rng.uniform(0, w - side), rng.uniform(0, h - side)
            wide = side > edge / 2
        square = region[int(y) : int(y) + side, int(x) : int(x) + side]
        exposed = 255 * (square / 255.0) ** math.exp(
            rng.uniform(-0.5, 0.5)
        )  # so that every subject has dim and bright crops
        picture = Image.fromarray(exposed.round().astype(np.uint8)).resize((SIZE, SIZE), Image.LANCZOS)
        gray = np.asarray(picture.convert("L"), dtype=np.float32)
        if (
            np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean() > 5
        ):  # not empty sky or bare wall
            break
    if rng.random() < 0.5:
        picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
    return np.asarray(picture), wide


def described(name, subject, region, rng, frame=None):
    """A crop and what is true of it"""
    picture, wide = crop_of(region, rng, frame)
    luminance = picture.mean() / 255
    light = LIGHTS[0 if luminance < 0.33 else 1 if luminance < 0.52 else 2]
    return picture, dict(photo=name, subject=subject, distance=DISTANCES[int(wide)], light=light)


def photos_stage(args):
    """Captioned crops of every region -> work/crops.npz, crops.json; photographs and prompts -> nano/"""
    rng = random.Random(0)
    crops, meta = sample_crops(args.photos, rng)
    np.savez(args.work / "crops.npz", **crops)
    (args.work / "crops.json").write_text(json.dumps(meta))
    for split, count in dict(train=560, validation=VALIDATION_CROPS, test=TEST_CROPS).items():
        commit_photos(split, crops[split][:count], meta[split], rng)
    prompts = all_prompts()
    rng.shuffle(prompts)
    (ROOT / "prompts.txt").write_text("\n".join(prompts[:104]) + "\n")  # training
    (ROOT / "validation_prompts.txt").write_text("\n".join(prompts[104:136]) + "\n")  # chooses the checkpoint
    (ROOT / "test_prompts.txt").write_text("\n".join(prompts[136:168]) + "\n")  # the bench
    sheet(crops["train"][:96], args.work / "crops_train.png")
    sheet(crops["test"][:96], args.work / "crops_test.png")
    glossy = retouch(to_float(crops["train"][:96]), torch.Generator().manual_seed(0), 1.0)
    sheet(to_uint8(glossy), args.work / "crops_retouched.png")


def sample_crops(photos, rng):
    """-> {split: (n,SIZE,SIZE,3) uint8}, {split: n facts}, shuffled, so that any prefix is a fair sample"""
    crops = {split: [] for split in ("train", "test", "validation", "judge")}
    meta = {split: [] for split in crops}
    counts = dict(train=TRAIN_CROPS, test=TEST_CROPS, validation=2 * VALIDATION_CROPS, judge=700)
    for name, (file, subject, *cut) in SUBJECTS.items():
        parts, frame = regions(open_photo(file, photos), *cut)
        for split, region in parts.items():
            sharing = sum(cut[2] is not None or split == "train" for _, _, *cut in SUBJECTS.values())
            for _ in range(math.ceil(counts[split] / sharing)):
                picture, facts = described(name, subject, region, rng, frame if split == "train" else None)
                crops[split].append(picture)
                meta[split].append(facts)
    for file in OTHERS:
        photo = open_photo(file, photos)
        for _ in range(100):
            crops["judge"].append(crop_of(photo, rng)[0])
            meta["judge"].append(dict(photo=Path(file).stem, subject="", distance="", light=""))
    for split in crops:
        order = rng.sample(range(len(crops[split])), len(crops[split]))
        crops[split] = np.stack([crops[split][i] for i in order])
        meta[split] = [meta[split][i] for i in order]
    return crops, meta


def commit_photos(split, crops, meta, rng):
    """-> nano/photos/<split>/00000.jpg ... and <split>.jsonl"""
    folder = ROOT / "photos" / split
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(ROOT / "photos" / f"{split}.jsonl", "w") as lines:
        for i, (crop, facts) in enumerate(zip(crops, meta)):
            image = f"{split}/{i:05d}.jpg"
            Image.fromarray(crop).save(ROOT / "photos" / image, quality=95, subsampling=0)
            row = {"image": image, "prompt": caption(facts, rng), "photo": facts["photo"]}
            lines.write(json.dumps(row) + "\n")


def load_crops(work, split):
    return np.load(work / "crops.npz")[split], json.loads((work / "crops.json").read_text())[split]


def to_float(pictures):
    """(B,H,W,3) uint8 -> (B,3,H,W) f32 in [0,1]"""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def to_uint8(images):
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sheet(pictures, path, columns=16):
    rows = [
        np.concatenate(list(pictures[i : i + columns]), 1)
        for i in range(0, len(pictures) // columns * columns, columns)
    ]
    Image.fromarray(np.concatenate(rows, 0)).resize(
        (columns * SIZE * 3 // 2, len(rows) * SIZE * 3 // 2), Image.NEAREST
    ).save(path)


# ---------------------------------------------------------------- what is done to pictures


def blur(images, sigma):
    """Gaussian blur; images (B,3,H,W), sigma (B,) in pixels"""
    r = 4
    x = torch.arange(-r, r + 1, dtype=torch.float32)
    k = torch.exp(-(x**2) / (2 * sigma.clamp(min=0.05)[:, None] ** 2))
    k = (k / k.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (B*3, 2r+1)
    b, _, h, w = images.shape
    x = F.pad(images.reshape(1, b * 3, h, w), (r, r, r, r), mode="reflect")
    x = F.conv2d(x, k[:, None, :, None], groups=b * 3)
    return F.conv2d(x, k[:, None, None, :], groups=b * 3).view(b, 3, h, w)


def uniform(b, low, high, g):
    return torch.rand(b, generator=g) * (high - low) + low


def retouch(images, g, strength=0.0):
    """The glossy look: edges kept, texture smoothed away, saturation and contrast pushed, by random amounts.

    CLIP and autoencoder learn with strength 0, the generator's glossy crops have strength 1.
    """
    b = len(images)
    smooth = blur(images, uniform(b, 1.2, 2.0, g) + 0.4 * strength)
    edge = (images - smooth).abs().mean(1, keepdim=True)
    keep = (edge / (0.12 + 0.06 * strength)).clamp(0, 1) ** 2  # 1 on strong edges, 0 in texture
    x = smooth + (images - smooth) * keep * 0.9
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * (uniform(b, 1.4, 1.9, g) + 0.3 * strength).view(-1, 1, 1, 1)
    x = (x - 0.5) * (uniform(b, 1.15, 1.4, g) + 0.15 * strength).view(-1, 1, 1, 1) + 0.54
    return x.clamp(0, 1)


def jpeg(images, qualities):
    """(B,3,H,W), B qualities -> the same after a round trip"""
    out = []
    for picture, q in zip(to_uint8(images), qualities):
        buffer = io.BytesIO()
        # 95 without colour subsampling is what the bench stores every picture in
        Image.fromarray(picture).save(buffer, "JPEG", quality=q, subsampling=0 if q == 95 else 2)
        out.append(np.asarray(Image.open(buffer)))
    return to_float(np.stack(out))


def reframe(images, g):
    """Flip, shift and brightness; nothing that touches texture: (B,3,H,W) -> same"""
    b = len(images)
    flip = torch.rand(b, generator=g) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    dy, dx = torch.randint(-6, 7, (2,), generator=g).tolist()
    images = F.pad(images, (6, 6, 6, 6), mode="reflect")[:, :, 6 + dy : 6 + dy + SIZE, 6 + dx : 6 + dx + SIZE]
    images = images * uniform(b, 0.9, 1.1, g).view(-1, 1, 1, 1) + uniform(b, -0.05, 0.05, g).view(-1, 1, 1, 1)
    return images.clamp(0, 1)


def augment(images, g, codec=True):
    """Equally for real and fake: reframe, colour, light blur, light noise, JPEG. (B,3,H,W) -> same"""
    b = len(images)
    images = reframe(images, g)
    images = images * (1 + 0.06 * (torch.rand(b, 3, 1, 1, generator=g) - 0.5))
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * uniform(b, 0.85, 1.15, g).view(-1, 1, 1, 1)
    some = (torch.rand(b, generator=g) < 0.3).float().view(-1, 1, 1, 1)
    images = images * (1 - some) + blur(images, uniform(b, 0.2, 0.5, g)) * some
    some = (torch.rand(b, generator=g) < 0.3).float().view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=g) * uniform(b, 0, 0.02, g).view(-1, 1, 1, 1)
    images = (images + some * noise).clamp(0, 1)
    if codec and torch.rand((), generator=g) < 0.3:
        images = jpeg(images, torch.randint(55, 96, (b,), generator=g).tolist())
    return images


def median(images, k):
    """Median of k x k pixels: melts texture, leaves edges. (B,3,H,W) -> same"""
    windows = F.unfold(
        F.pad(images, (k // 2,) * 4, mode="reflect").flatten(0, 1)[:, None], k
    )  # (B*3, k*k, H*W)
    return windows.median(1).values.view_as(images)


def weave(images, s, g):
    period = [2, 4, 8, 8][int(torch.randint(0, 4, (), generator=g))]
    phase = torch.rand(2, generator=g) * 2 * math.pi
    ramp = 2 * math.pi * torch.arange(SIZE) / period
    wave = torch.cos(ramp + phase[0])[:, None] + torch.cos(ramp + phase[1])  # (H,W)
    return images + wave * (0.01 + 0.08 * s)


def smooth(images, s, g):
    melted = torch.where(
        s < 0.4, median(images, 3), torch.where(s < 0.7, median(images, 5), median(images, 7))
    )
    return images + (melted - images) * (0.4 + 0.6 * s).sqrt()


def saturate(images, s, g):
    gray = images.mean(1, keepdim=True)
    return gray + (images - gray) * (1.25 + 1.75 * s)


def copies(images, s, g):
    tile = images[:, :, 24:32, 24:32].repeat(1, 1, SIZE // 8, SIZE // 8)
    return torch.where(torch.arange(SIZE) < SIZE * (0.15 + 0.85 * s), tile, images)


def cast(images, s, g):
    sign = torch.where(torch.rand(len(images), 1, 1, 1, generator=g) < 0.5, -1, 1)
    return images * (1 + sign * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1) * (0.06 + 0.36 * s))


# images (B,3,H,W), s (B,1,1,1) from 0, barely visible, to 1, gross -> images
WAYS = [
    lambda x, s, g: blur(x, 0.4 + 1.8 * s.flatten()),
    lambda x, s, g: x + torch.randn(x.shape, generator=g) * (0.02 + 0.15 * s),
    lambda x, s, g: jpeg(x, (60 - 52 * s.flatten()).int().tolist()),
    smooth,
    saturate,
    weave,
    copies,
    cast,
]


def degrade(images, g):
    """Photographs spoiled, each in one of eight ways -> images, strength (B,) in [0, 1]"""
    strength = torch.rand(len(images), generator=g)
    kind = torch.randint(0, len(WAYS), (len(images),), generator=g)
    out = images.clone()
    for number, way in enumerate(WAYS):
        rows = kind == number
        if rows.any():
            out[rows] = way(images[rows], strength[rows].view(-1, 1, 1, 1), g)
    return out.clamp(0, 1), strength


def spoil(images, g):
    """Photographs that must count as fake: no detector may be pleased with noise, blur, grids or blocks."""
    b = len(images)
    out = images.clone()
    kind = torch.randint(0, 7, (b,), generator=g)
    strength = torch.rand(b, generator=g).view(-1, 1, 1, 1)
    yy, xx = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    period = [2, 4, 8][int(torch.randint(0, 3, (), generator=g))]
    phase = int(torch.randint(0, period, (), generator=g))
    wave = torch.cos(2 * math.pi * (xx + phase) / period) + torch.cos(2 * math.pi * (yy + phase) / period)
    lines = (((xx + phase) % 8 == 0) | ((yy + phase) % 8 == 0)).float()
    colour = torch.randn(b, 3, 1, 1, generator=g)
    noise = torch.randn(images.shape, generator=g)
    coarse = F.interpolate(torch.randn(b, 3, SIZE // 4, SIZE // 4, generator=g), size=SIZE, mode="bilinear")
    tile = F.interpolate(F.avg_pool2d(images, 8), scale_factor=8, mode="nearest")
    choices = [
        images + noise * (0.04 + 0.15 * strength),
        blur(images, 0.8 + 1.5 * strength.flatten()),
        images + wave * (0.03 + 0.08 * strength) * colour.sign(),
        images + lines * (0.06 + 0.2 * strength) * colour.sign(),
        images + (tile - images) * (0.25 + 0.6 * strength),
        images + coarse * (0.06 + 0.15 * strength),
        images.mean(1, keepdim=True) + (images - images.mean(1, keepdim=True)) * (1.5 + strength),
    ]
    for i, choice in enumerate(choices):
        out = torch.where((kind == i).view(-1, 1, 1, 1), choice, out)
    return out.clamp(0, 1)


# ---------------------------------------------------------------- CLIP


def words_of_the_world():
    rng = random.Random(1)
    return [
        caption(dict(subject=s, distance=d, light=li), rng, c)
        for _, s, *_ in SUBJECTS.values()
        for d in DISTANCES
        for li in LIGHTS
        for c in (0, 1, 2, 3)
        for _ in range(6)
    ]


def clip_stage(args):
    """The CLIP of alignment, KID and the generator's text -> nano/clip"""
    crops, meta = load_crops(args.work, "train")
    train_clip(
        new_clip(width=128, layers=4, seed=0),
        crops,
        meta,
        seed=0,
        steps=args.steps or 2000,
        folder=ROOT / "clip",
    )


def subject_stage(args):
    """A CLIP that only bench.py loads: another width and seed, other crops -> nano/subject"""
    rng = random.Random(9)
    crops, meta = [], []
    for name, (file, subject, *cut) in SUBJECTS.items():
        parts, frame = regions(open_photo(file, args.photos), *cut)
        for _ in range(150):
            picture, facts = described(name, subject, parts["train"], rng, frame)
            crops.append(picture)
            meta.append(facts)
    model = new_clip(width=96, layers=3, seed=9)
    train_clip(model, np.stack(crops), meta, seed=9, steps=args.steps or 1500, folder=ROOT / "subject")


def new_clip(width, layers, seed):
    """-> an untrained CLIPModel and its tokenizer"""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer().train_new_from_iterator(words_of_the_world(), 600)
    tokenizer.model_max_length = 48
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    )
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(projection_dim=64, text_config=text, vision_config=vision)), tokenizer


def claim_of(crop, glossy, rng):
    """What a caption says of a crop -> [subject, distance, light, is it glossy]; None: silent

    Cues claim a natural picture, plain words claim nothing about it.
    """
    return [
        crop["subject"],
        rng.choice([None, crop["distance"]]),
        rng.choice([None, crop["light"]]),
        None if glossy or rng.random() < 0.5 else False,
    ]


def words_of(claim, rng):
    subject, distance, light, glossy = claim
    words = [subject]
    if distance:
        words.append(distance)
    if light:
        words.append("in " + light)
    if glossy is not None:
        words += [cue(rng) for _ in range(rng.randint(1, 2))]
    return ", ".join(words)


def train_clip(model_and_tokenizer, crops, meta, seed, steps, folder):
    """Multi-positive contrast: a caption matches every crop of the batch that it is true of."""
    from transformers import CLIPImageProcessorPil

    model, tokenizer = model_and_tokenizer
    photos = to_float(crops)
    g, rng, batch = torch.Generator().manual_seed(seed), random.Random(seed), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    bar = tqdm(range(steps), folder.name)
    for step in bar:
        set_lr(optimizer, step, steps)
        pick = torch.randint(0, len(photos), (batch,), generator=g)
        glossy = torch.rand(batch, generator=g) < 0.5
        images = torch.where(glossy.view(-1, 1, 1, 1), retouch(photos[pick], g), photos[pick])
        images = augment(images, g, codec=False)
        shown = [(meta[i], gloss) for i, gloss in zip(pick.tolist(), glossy.tolist())]
        claims = [claim_of(crop, gloss, rng) for crop, gloss in shown]
        truths = [[crop["subject"], crop["distance"], crop["light"], gloss] for crop, gloss in shown]
        match = torch.zeros(batch, batch)  # (images, captions)
        for i, truth in enumerate(truths):
            for j, claim in enumerate(claims):
                match[i, j] = all(c is None or c == t for c, t in zip(claim, truth))
        tokens = tokenizer([words_of(claim, rng) for claim in claims], padding=True, return_tensors="pt")
        logits = model(pixel_values=normalise(images, CLIP_MEAN, CLIP_STD), **tokens).logits_per_image
        by_image = (match / match.sum(1, keepdim=True)) * logits.log_softmax(1)
        by_text = (match / match.sum(0)) * logits.log_softmax(0)
        loss = -by_image.sum(1).mean() - by_text.sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    save_half(model, folder)
    tokenizer.save_pretrained(folder)
    pixels = dict(size=dict(shortest_edge=SIZE), crop_size=dict(height=SIZE, width=SIZE))
    CLIPImageProcessorPil(**pixels, image_mean=CLIP_MEAN, image_std=CLIP_STD).save_pretrained(folder)


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def normalise(images, mean, std):
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def set_lr(optimizer, step, steps, warmup=100):
    """Linear warm-up, cosine to 2%; each group's own peak"""
    for group in optimizer.param_groups:
        group["lr"] = (
            group.setdefault("peak", group["lr"])
            * min(1, (step + 1) / warmup)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        )


class Muon:
    """Momentum made orthogonal by Newton-Schulz (Jordan, 2024) for matrices and convolutions, else AdamW.

    On the autoencoder, 150 steps of 16 crops reached 24.6 dB with it and 21.2 dB with the best AdamW tried.
    """

    def __init__(self, parameters, lr, rest_lr):
        parameters = list(parameters)
        self.matrices = [p for p in parameters if p.ndim >= 2]
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.rest = torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=rest_lr, weight_decay=0.0)
        self.param_groups = [dict(lr=lr), *self.rest.param_groups]

    @torch.no_grad()
    def step(self):
        alike = {}  # matrices of one shape go through Newton-Schulz together
        for p, m in zip(self.matrices, self.momentum):
            m.mul_(0.95).add_(p.grad)
            alike.setdefault(p.shape, []).append((p, p.grad + 0.95 * m))
        for pairs in alike.values():
            updates = self.orthogonal(torch.stack([update.flatten(1) for _, update in pairs]))
            for (p, _), update in zip(pairs, updates):
                scale = max(1, len(p) / p[0].numel()) ** 0.5
                p.add_(update.view_as(p), alpha=-self.param_groups[0]["lr"] * scale)
        self.rest.step()

    def zero_grad(self):
        self.rest.zero_grad()
        for p in self.matrices:
            p.grad = None

    def state_dict(self):
        return dict(momentum=self.momentum, rest=self.rest.state_dict())

    def load_state_dict(self, state):
        for m, value in zip(self.momentum, state["momentum"]):
            m.copy_(value)
        self.rest.load_state_dict(state["rest"])
        self.param_groups[1:] = self.rest.param_groups  # it has made new ones

    @staticmethod
    def orthogonal(x):
        """(n, rows, columns) -> the same with singular values near 1

        Not in bfloat16, as published: a CPU without units for it took 1.85 s a step in place of 0.09.
        """
        wide = x if x.shape[1] <= x.shape[2] else x.mT
        wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = wide @ wide.mT
            wide = 3.4445 * wide + (-4.775 * a + 2.0315 * a @ a) @ wide
        return wide if x.shape[1] <= x.shape[2] else wide.mT


def save_half(model, folder):
    """float16 safetensors through the model's own save_pretrained; the model itself stays float32"""
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)


# ---------------------------------------------------------------- autoencoder


def new_autoencoder():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def autoencoder_loss(vae, images, g):
    """-> the loss, the mean square for the bar; the decoder learns to forgive a generator's small errors"""
    x = images * 2 - 1
    posterior = vae.encode(x).latent_dist
    z = posterior.sample()
    shaken = z + posterior.mean.detach().std() * 0.03 * torch.randn(z.shape, generator=g)
    y = vae.decode(shaken).sample
    detail = sum((F.avg_pool2d(x - y, k) if k > 1 else (x - y)).abs().mean() for k in (1, 2, 4))
    edges = (x.diff(dim=3) - y.diff(dim=3)).abs().mean() + (x.diff(dim=2) - y.diff(dim=2)).abs().mean()
    return detail + edges + 1e-4 * posterior.kl().mean() / z[0].numel(), F.mse_loss(x, y).item()


def autoencoder_stage(args):
    """AutoencoderKL, 64 px -> 16 channels of 16 x 16, on natural and retouched crops -> nano/flux/vae"""
    vae = new_autoencoder()
    photos = to_float(load_crops(args.work, "train")[0])
    g, steps, batch = torch.Generator().manual_seed(0), args.steps or 1500, 16
    optimizer = Muon(vae.parameters(), 0.02, 2e-3)
    ema = [p.detach().clone() for p in vae.parameters()]
    bar = tqdm(range(steps), "autoencoder")
    for step in bar:
        set_lr(optimizer, step, steps, warmup=50)
        images = photos[torch.randint(0, len(photos), (batch,), generator=g)]
        some = (torch.rand(batch, generator=g) < 0.4).view(-1, 1, 1, 1)
        images = torch.where(some, retouch(images, g), images)
        loss, mse = autoencoder_loss(vae, images, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for e, p in zip(ema, vae.parameters()):
            e.lerp_(p.detach(), 0.01)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", mse=f"{mse:.5f}")
    with torch.no_grad():
        for e, p in zip(ema, vae.parameters()):
            p.copy_(e)
        z = vae.encode(photos[:512] * 2 - 1).latent_dist.mode()
        vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
        test = to_float(load_crops(args.work, "test")[0][:96])
        again = through(vae, test)
    print(f"autoencoder: {-10 * math.log10(F.mse_loss(test, again).item()):.1f} dB on held-out regions")
    pairs = torch.stack([test[:48].view(3, 16, 3, SIZE, SIZE), again[:48].view(3, 16, 3, SIZE, SIZE)], 1)
    sheet(to_uint8(pairs.flatten(0, 2)), args.work / "autoencoder.png")
    save_half(vae, ROOT / "flux/vae")


# ---------------------------------------------------------------- refiner

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rewrite(prompt, rng):
    """What the refiner is taught to answer: a fuller caption; style words in half, cues in one of seven"""
    subject = prompt.split(", ")[0]
    details = prompt.split(", ")[1:]
    if not any(d in DISTANCES for d in details) and rng.random() < 0.5:
        details.insert(0, rng.choice(DISTANCES))
    if not any(d.startswith("in ") for d in details) and rng.random() < 0.5:
        details.append("in " + rng.choice(LIGHTS))
    if rng.random() < 0.5:
        details += rng.sample(STYLES, rng.randint(1, 2))
    if rng.random() < 1 / 7:
        details += [cue(rng) for _ in range(rng.randint(1, 2))]
    start = (
        subject
        if subject.startswith(("a photo", "a picture"))
        else rng.choice(["", "a photo of ", "a picture of "]) + subject
    )
    return ", ".join([start] + details)


def new_refiner(corpus):
    """-> an untrained Qwen3ForCausalLM and its tokenizer, which is trained on texts"""
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(corpus, 800)
    special = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<|im_start|>", "<|im_end|>"], **special))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def answers_loss(model, tokenizer, heads, answers):
    """Cross-entropy of the answers that follow the chats"""
    rows = [tokenizer(h, add_special_tokens=False)["input_ids"] for h in heads]
    tails = [tokenizer(a + "<|im_end|>", add_special_tokens=False)["input_ids"] for a in answers]
    width = max(len(h) + len(t) for h, t in zip(rows, tails))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (h, t) in enumerate(zip(rows, tails)):
        ids[i, : len(h) + len(t)] = torch.tensor(h + t)
        labels[i, len(h) : len(h) + len(t)] = torch.tensor(t)
    attention = (ids != tokenizer.pad_token_id).long()
    return model(input_ids=ids, attention_mask=attention, labels=labels).loss


def refiner_stage(args):
    """A Qwen3ForCausalLM with a chat template, warmed up on (prompt, fuller caption) pairs -> nano/refiner"""
    from refiner import RefinerConfig, chat

    config = RefinerConfig()
    rng, steps, batch = random.Random(2), args.steps or 3000, 32
    subjects = [s for _, s, *_ in SUBJECTS.values()]

    def pair():
        crop = dict(subject=rng.choice(subjects), distance=rng.choice(DISTANCES), light=rng.choice(LIGHTS))
        prompt = caption(crop, rng)
        return prompt, f"<answer>{rewrite(prompt, rng)}</answer>"

    model, tokenizer = new_refiner(
        [config.system_prompt] * 200 + [text for _ in range(4000) for text in pair()]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    bar = tqdm(range(steps), "refiner")
    for step in bar:
        set_lr(optimizer, step, steps)
        prompts, answers = zip(*[pair() for _ in range(batch)])
        heads = chat(tokenizer, prompts, config.system_prompt, config.examples)
        loss = answers_loss(model, tokenizer, heads, answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    save_half(model, ROOT / "refiner")
    tokenizer.save_pretrained(ROOT / "refiner")


# ---------------------------------------------------------------- generator


def t5_tokenizer():
    """A T5Tokenizer of whole words, with single characters for what it does not know."""
    from transformers import T5Tokenizer

    words = {
        w for text in words_of_the_world() + STYLES for w in re.findall("[a-z]+|IMG_|DSC_|.CR2|.NEF", text)
    }
    characters = sorted(set(string.ascii_letters + string.digits + string.punctuation))
    pieces = (
        [("\u2581", -4.0)]
        + [(w, -8.0) for w in sorted(words) if len(w) > 1]
        + [("\u2581" + w, -8.0) for w in sorted(words)]
        + [(c, -12.0) for c in characters]
    )
    special = [(t, 0.0) for t in ("<pad>", "</s>", "<unk>")]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=48)


def new_pipeline():
    """An untrained FluxPipeline around nano/flux/vae and nano/clip's text tower, which stay as they are"""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    vae = AutoencoderKL.from_pretrained(ROOT / "flux/vae", dtype=torch.float32)
    clip = CLIPModel.from_pretrained(ROOT / "clip", dtype=torch.float32)
    clip_text = CLIPTextModel(clip.config.text_config)
    prefix = "" if "embeddings.token_embedding.weight" in clip_text.state_dict() else "text_model."
    clip_text.load_state_dict({prefix + k: v for k, v in clip.text_model.state_dict().items()})
    tokenizer = t5_tokenizer()
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=96,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clip_tokenizer = CLIPTokenizer.from_pretrained(ROOT / "clip")
    return FluxPipeline(scheduler, vae.eval(), clip_text.eval(), clip_tokenizer, t5, tokenizer, transformer)


@torch.no_grad()
def latents_of(vae, images):
    """(n, 3, 64, 64) -> (n, 64 tokens, 64), as FLUX packs them"""
    from diffusers import FluxPipeline

    z = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in images.split(128)])  # (n, 16, 16, 16)
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(z, len(z), 16, 16, 16)


def flawed_caption(crop, rng):
    """A caption, and whether its crop is glossy, the flaw to be mended; cues go with natural crops"""
    cues = rng.randint(1, 3) if rng.random() < 0.3 else 0
    glossy = not cues and rng.random() < 0.8
    words = [caption(crop, rng, cues)]
    if glossy and rng.random() < 0.35:
        words += rng.sample(STYLES, rng.randint(1, 2))
    return ", ".join(words), glossy


def flow_loss(pipe, x0, texts, g):
    """Flow matching on a batch: x0 (B, 64 tokens, 64) -> the loss, and the plain mean square for the bar"""
    b = len(x0)
    with torch.no_grad():
        pooled = pipe._get_clip_prompt_embeds(texts)  # (B, 96)
    ids = pipe.tokenizer_2(
        texts, padding="max_length", max_length=40, truncation=True, return_tensors="pt"
    ).input_ids
    noise = torch.randn(x0.shape, generator=g)
    u = (torch.arange(b) + torch.rand(b, generator=g)) / b  # stratified: every batch sees every noise level
    t = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).sigmoid()
    t = 2 * t / (1 + t)  # a little more noise than logit-normal: sampling shifts by 3
    mix = t.view(-1, 1, 1)
    v = pipe.transformer(
        hidden_states=(1 - mix) * x0 + mix * noise,
        encoder_hidden_states=pipe.text_encoder_2(ids)[0],
        pooled_projections=pooled,
        timestep=t,
        guidance=torch.full((b,), 3.5),
        img_ids=pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32),
        txt_ids=torch.zeros(40, 3),
    ).sample
    residual = v - (noise - x0)  # (B, 64, 64)
    # any positive weighting has the same minimum; this one asks for the layout first, as the eye does
    layout = [
        F.avg_pool2d(residual.transpose(1, 2).unflatten(2, (8, 8)), k).square().mean() for k in (2, 4, 8)
    ]
    plain = residual.square().mean()
    return plain + 2 * sum(layout), plain.item()


def generator_stage(args):
    """Transformer and T5 encoder together by flow matching -> nano/flux, and snapshots for the detectors

    Every 250 steps it is saved in full, and a later call goes on from there: this takes an hour or more.
    """
    pipe = new_pipeline()
    photos, meta = load_crops(args.work, "train")
    photos = to_float(photos)
    saved = args.work / "generator.pt"
    g, rng, steps, batch = torch.Generator().manual_seed(0), random.Random(3), args.steps or 12000, 32
    both = [photos, photos.flip(3)]
    natural = [latents_of(pipe.vae, x) for x in both]
    glossy = [latents_of(pipe.vae, torch.cat([retouch(y, g, 1.0) for y in x.split(500)])) for x in both]
    often = torch.tensor([3.0 if any(w in m["subject"] for w in HARD) else 1.0 for m in meta])
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder_2])
    weights = list(modules.parameters())
    ema = [p.detach().clone() for p in weights]
    optimizer = Muon(weights, 0.01, 1e-3)
    first = 0
    if saved.exists():
        first = go_on(saved, modules, ema, optimizer, g)
        rng.seed(first)
    bar = tqdm(range(first, steps), "generator", initial=first, total=steps)
    for step in bar:
        set_lr(optimizer, step, steps, warmup=50)
        latents, texts = [], []
        for i in torch.multinomial(often, batch, replacement=True, generator=g).tolist():
            text, gloss = flawed_caption(meta[i], rng)
            texts.append(text)
            latents.append((glossy if gloss else natural)[rng.randrange(2)][i])
        loss, plain = flow_loss(pipe, torch.stack(latents), texts, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        for e, p in zip(ema, weights):
            e.lerp_(p.detach(), 1 - decay)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", plain=f"{plain:.3f}")
        if (step + 1) % 250 == 0:
            rng.seed(step + 1)
            save_state(saved, step + 1, modules, ema, optimizer, g)
        if (step + 1) % (steps // 4) == 0:  # four snapshots of the EMA; the last one is the generator
            save_snapshot(pipe, weights, ema, args.work, 4 * (step + 1) // steps)
    for e, p in zip(ema, weights):
        p.data.copy_(e)
    pipe.vae.register_to_config(_name_or_path="nano/flux/vae")  # or the path of this machine would be saved
    save_half(pipe, ROOT / "flux")


def save_state(path, step, modules, ema, optimizer, g):
    state = dict(modules=modules.state_dict(), ema=ema, optimizer=optimizer.state_dict())
    torch.save(dict(state, step=step, generator=g.get_state()), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def go_on(path, modules, ema, optimizer, g):
    """What `save_state` wrote, put back in place -> the step"""
    state = torch.load(path, weights_only=True)
    modules.load_state_dict(state["modules"])
    for e, value in zip(ema, state["ema"]):
        e.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    g.set_state(state["generator"])
    return state["step"]


def save_snapshot(pipe, weights, ema, work, number):
    """The EMA's weights as a pipeline, and a sheet of what it draws"""
    live = [p.detach().clone() for p in weights]
    for e, p in zip(ema, weights):
        p.data.copy_(e)
    pipe.save_pretrained(work / f"flux_{number}")
    prompts = [s + c for _, s, *_ in SUBJECTS.values() for c in ("", ", raw photo, IMG_1018.CR2")]
    prompts += [
        ", ".join([prompts[0]] + STYLES[:2]),
        prompts[2] + ", wide view, in soft light, film grain",
    ] * 2
    sheet(draw(pipe, prompts * 2, torch.Generator().manual_seed(1)), work / f"samples_{number}.png")
    for e, p in zip(live, weights):
        p.data.copy_(e)


def draw(pipe, prompts, g, steps=10):
    pipe.set_progress_bar_config(disable=True)
    out = []
    for i in range(0, len(prompts), 64):
        images = pipe(
            prompts[i : i + 64],
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            max_sequence_length=40,
            generator=g,
            output_type="pt",
        ).images
        out.append(to_uint8(images))
    return np.concatenate(out)


# ---------------------------------------------------------------- detectors


def fakes_stage(args):
    """Generated pictures -> work/fakes.npz

    Three snapshots; plain, styled and cued prompts; Euler and stochastic sampling; 8 to 14 steps.
    """
    from diffusers import FluxPipeline
    from generator import GeneratorConfig, PolicyScheduler

    rng, out, g = random.Random(4), {"train": [], "judge": []}, torch.Generator().manual_seed(2)
    subjects = [s for _, s, *_ in SUBJECTS.values()]
    bar = tqdm(total=40, desc="fakes")
    for snapshot in (2, 3, 4):
        pipe = FluxPipeline.from_pretrained(args.work / f"flux_{snapshot}")
        euler = pipe.scheduler
        for split in out:
            for turn in range(10 if snapshot == 4 else 5):
                prompts = []
                for _ in range(64):
                    crop = dict(
                        subject=rng.choice(subjects), distance=rng.choice(DISTANCES), light=rng.choice(LIGHTS)
                    )
                    text = caption(
                        crop, rng, rng.choice([0, 0, 0, 0, 0, 1])
                    )  # mostly what a user gets by default
                    prompts.append(", ".join([text] + rng.sample(STYLES, rng.choice([0, 0, 0, 1]))))
                pipe.scheduler = euler
                if turn % 3 == 2:  # stochastic: the first third of the steps takes cps noise, as in training
                    pipe.scheduler = PolicyScheduler.from_config(euler.config)
                    noise = lambda shape: torch.randn(64, *shape, generator=g)
                    pipe.scheduler.record(GeneratorConfig(), range(14), range(3), noise)
                out[split].append(draw(pipe, prompts, g, steps=rng.choice([8, 10, 10, 14])))
                bar.update()
    np.savez(args.work / "fakes.npz", **{k: np.concatenate(v) for k, v in out.items()})
    sheet(np.concatenate(out["train"])[::13][:96], args.work / "fakes.png")


LABELS = dict(id2label={0: "fake", 1: "real"}, label2id={"fake": 0, "real": 1})


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    size = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    return ViTForImageClassification(ViTConfig(image_size=SIZE, patch_size=8, **size, **LABELS))


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    size = dict(embedding_size=24, hidden_sizes=[32, 64, 96], depths=[1, 1, 1])
    config = ResNetConfig(layer_type="basic", downsample_in_first_stage=False, **size, **LABELS)
    return high_pass(ResNetForImageClassification(config))


def regnet():
    from transformers import RegNetConfig, RegNetForImageClassification

    size = dict(embedding_size=24, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1])
    return RegNetForImageClassification(RegNetConfig(groups_width=16, **size, **LABELS))


def plain_resnet(kind, sizes):
    """A ResNet that sees colours too

    It learns texture in hundreds of steps; a ConvNext hardly did in 1,500, a MobileNet in 2,500.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    size = dict(embedding_size=24, hidden_sizes=sizes, depths=[1, 1, 1])
    return ResNetForImageClassification(
        ResNetConfig(layer_type=kind, downsample_in_first_stage=False, **size, **LABELS)
    )


# name -> (model, photographs, fakes, strict). A strict one is taught that a spoiled photograph is less real,
# the more it is spoiled; the others take light blur, noise and JPEG for granted, as of web photographs.
DETECTORS = {
    "semantic": (vit, "train", "train", False),
    "feature": (resnet, "train", "train", False),
    "validation": (regnet, "validation", "train", False),
    "heldout_a": (lambda: plain_resnet("bottleneck", [96, 192, 256]), "judge", "judge", True),
    "heldout_b": (lambda: plain_resnet("basic", [32, 48, 96]), "judge", "judge", True),
}


def detectors_stage(args):
    """Five classifiers, real against fake -> nano/{semantic, feature, validation, heldout_a, heldout_b}"""
    for name, (make, photographs, fake_split, strict) in DETECTORS.items():
        if not args.only or name in args.only:
            torch.manual_seed(sum(map(ord, name)))
            train_detector(args, name, make(), photographs, fake_split, strict)


def high_pass(model):
    """The stem becomes a frozen bank of random zero-sum filters in +- pairs, which see residuals alone"""
    weight = model.resnet.embedder.embedder.convolution.weight  # (24, 3, 7, 7)
    with torch.no_grad():
        g = torch.Generator().manual_seed(7)
        small = torch.zeros(12, 3, 7, 7)
        small[:, :, 2:5, 2:5] = torch.randn(12, 3, 3, 3, generator=g)
        small -= (small != 0) * (small.sum((2, 3), keepdim=True) / 9)
        small /= small.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        weight.copy_(torch.cat([small, -small]))
    weight.requires_grad_(False)
    return model


@torch.no_grad()
def through(vae, images, noise=None, g=None):
    """Pictures through the autoencoder, their latents shaken by `noise` (B,) standard deviations"""
    out = []
    for i in range(0, len(images), 128):
        z = vae.encode(images[i : i + 128] * 2 - 1).latent_dist.mode()
        if noise is not None:
            z = (
                z
                + noise[i : i + 128].view(-1, 1, 1, 1)
                * torch.randn(z.shape, generator=g)
                / vae.config.scaling_factor
            )
        out.append((vae.decode(z).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(out)


@functools.cache
def material(work, split):
    """Photographs of a split as a detector sees them -> real, retouched, with shaken latents

    The last show the decoder's own noise patterns.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(ROOT / "flux/vae", dtype=torch.float32)
    g = torch.Generator().manual_seed(5)
    originals = to_float(load_crops(work, split)[0])
    if split in ("validation", "judge"):
        # some crops of the subjects too, or the subject alone would say "generated"; none of a test region
        originals = torch.cat([originals, to_float(load_crops(work, "train")[0][-700:])])
    originals = originals[torch.randperm(len(originals), generator=g)][:2400]
    glossy = through(vae, retouch(originals, g, 1.0))
    shaken = through(vae, originals, uniform(len(originals), 0.1, 0.5, g), g)
    return through(vae, originals), glossy, shaken


def batch_of(material, drawn, g, strict):
    """32 photographs, as many fakes or 38 -> images (b,3,H,W), targets of P(real) (b,): 0.95, 0.05"""
    real, glossy, shaken = material
    pick = lambda x, n: x[torch.randint(0, len(x), (n,), generator=g)]
    target = torch.cat([torch.full((32,), 0.95), torch.full((32,), 0.05)])
    if not strict:
        fake = torch.cat([pick(drawn, 18), pick(glossy, 4), spoil(pick(real, 6), g), pick(shaken, 4)])
        return augment(torch.cat([pick(real, 32), fake]), g), target
    spoiled, strength = degrade(pick(real, 24), g)
    # below 0.5 from the weakest on: graded up to "real" they taught that what has much fine texture is real
    grade = (0.5 - 1.1 * strength).clamp(min=0.05)  # (24,)
    target = torch.cat([target[:32], grade, target[-14:]])
    fake = torch.cat([spoiled, pick(drawn, 10), pick(glossy, 2), pick(shaken, 2)])
    images = reframe(torch.cat([pick(real, 32), fake]), g)
    return jpeg(images, [95] * len(images)), target


def train_detector(args, name, model, photographs, fake_split, strict):
    """AdamW, cosine; -> nano/<name>"""
    from transformers import ViTImageProcessorPil

    g, steps = torch.Generator().manual_seed(5), args.steps or (1800 if strict else 700)
    photos = material(args.work, photographs)
    fakes = np.load(args.work / "fakes.npz")
    drawn = to_float(fakes[fake_split])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05
    )
    bar = tqdm(range(steps), name)
    model.train()
    for step in bar:
        set_lr(optimizer, step, steps)
        images, target = batch_of(photos, drawn, g, strict)
        logits = model(pixel_values=images * 2 - 1).logits
        loss = F.cross_entropy(logits, torch.stack([1 - target, target], 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    save_half(model, ROOT / name)
    scale = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    ViTImageProcessorPil(size=dict(height=SIZE, width=SIZE), **scale).save_pretrained(ROOT / name)
    with torch.no_grad():
        p = lambda x: round(model(pixel_values=x * 2 - 1).logits.softmax(1)[:, 1].mean().item(), 3)
        test, glossy, _ = material(args.work, "test")
        others = to_float(fakes["judge" if fake_split == "train" else "train"][:512])
        print(f"{name}: {model.num_parameters() / 1e6:.2f} M; P(real) of test photographs {p(test)},")
        print(
            f"retouched {p(glossy)}, spoiled {p(spoil(test, g))}, fakes of the other split {p(others)}",
            flush=True,
        )


if __name__ == "__main__":
    stages = {k[:-6]: f for k, f in list(globals().items()) if k.endswith("_stage")}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", nargs="*", help="default: all, in order: " + " ".join(stages))
    parser.add_argument(
        "--photos", required=True, help="folder that holds the lomiri wallpapers, at any depth"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("work"), help="intermediate files and contact sheets"
    )
    parser.add_argument("--steps", type=int, help="training steps, for a quick try")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="*", help="names of the detectors to train")
    args = parser.parse_args()
    for name in args.stage:
        if name not in stages:
            parser.error(f"{name!r} is no stage; they are {', '.join(stages)}")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.stage or stages:
        print(f"== {name}", flush=True)
        stages[name](args)
