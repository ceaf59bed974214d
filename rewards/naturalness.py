"""How natural the grain and colour of a picture are: a reward without a network and without fakes.

    kind: rewards/naturalness.py:Naturalness    model: JSON lines {"image", "prompt"} of photographs

The family of BRISQUE and NIQE (Mittal et al. 2012, 2013), and of IL-NIQE in its opponent colours. With mu and
sigma the mean and the deviation around a pixel, the coefficients of a photograph

    z = (x - mu) / (sigma + 5/255)

have nearly the same distribution whatever it shows. Noise, JPEG, smoothing and grids change that of z or of
the products of neighbours; blur changes how fast the spectrum falls. Statistics of all three are fitted on
photographs; a picture's distance to them is Mahalanobis's; the reward is the share of other photographs that
are farther away, so photographs have about 0.5.
Higher is not more real without end: no photograph is as typical as the mean of all. The nano policy, which
never trains on this, goes past photographs. So judge with it next to a two-sided measure: bench.py also gives
KID of these statistics. What happens when a policy trains on it was not tried.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from pipeline import reconstruct
from reward import load_frozen, read_photos

# luminance, red against green, yellow against blue
OPPONENT = F.normalize(
    torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
)
NEIGHBOURS = [(0, 1), (1, 0), (1, 1), (1, -1)]  # dy, dx
# what counts as flat; of 1, 3, 5 and 8 grey levels this one ranks most distortions of the bench
CONTRAST = 5 / 255
SOFTNESS = 0.05  # of the rank, in log distance: beyond the last photograph there is still a slope


def around(x):
    """Gaussian mean of 7 x 7 pixels: (B,C,H,W) -> the same"""
    pixels = torch.arange(-3.0, 4.0, device=x.device)
    line = (-(pixels**2) / 2 / (7 / 6) ** 2).softmax(0)  # (7,), of sum 1
    line = line.expand(x.shape[1], 1, 1, 7)  # (C,1,1,7)
    x = F.pad(x, (3, 3, 3, 3), mode="reflect")
    x = F.conv2d(x, line, groups=x.shape[1])
    return F.conv2d(x, line.transpose(2, 3), groups=x.shape[1])


def average(x):
    return x.mean((2, 3))  # (B,C,H,W) -> (B, C)


def energy(x):
    # above 0 for a flat picture too
    return average(x.square()) + 1e-6  # (B, C)


def shape_of(z):
    """Three numbers for a distribution around 0, as a generalised Gaussian has: (B,C,H,W) -> (B, C, 3)

    Log second moment, (E|z|)^2 / E z^2, which tells heavy tails, and the log ratio of its two sides.
    """
    square = z.square()
    # 0.003: a picture without any grain is far from photographs, but not without bound
    second = average(square) + 0.003  # (B, C)
    left = average(square * (z < 0)) + 0.003
    right = average(square * (z > 0)) + 0.003
    heavy = average(z.abs()).square() / second
    return torch.stack([second.log(), heavy, (left / right).log()], -1)


def statistics(images):
    """(B,3,H,W) in [0,1] -> (B, D): 18 numbers for each of 3 colours and 2 or more scales, 9 for the whole

    Two scales up to 64 pixels, D = 117; one more for each doubling. 32 pixels at least.
    """
    x = torch.einsum("oc,bchw->bohw", OPPONENT.to(images.device), images)  # (B,3,H,W)
    doublings = math.log2(min(images.shape[2:]) / 64)
    scales = 2 + max(0, math.ceil(doublings))
    found = [(x.var((2, 3)) + 1e-6).log()]  # (B, 3)
    for axis in (2, 3):
        # how fast the spectrum falls: z hides a weak blur, because sigma shrinks along with x - mu
        first = x.diff(dim=axis)
        ratio = energy(first.diff(dim=axis)) / energy(first)
        found.append(ratio.log())  # (B, 3)
    for _ in range(scales):
        mean = around(x)
        variance = around(x.square()) - mean.square()
        contrast = variance.clamp(min=0).sqrt() + CONTRAST  # (B,3,H,W)
        z = (x - mean) / contrast
        maps = [z]
        for step in NEIGHBOURS:
            maps.append(z * z.roll(step, (2, 3)))
        found += [shape_of(m).flatten(1) for m in maps]  # (B, 9) each
        found.append(average(contrast.log()))  # (B, 3)
        found.append(contrast.log().std((2, 3)))  # (B, 3)
        # a cast moves what luminance and colours have in common; light and shade alone move all three
        found.append(average(z * z.roll(1, 1)))  # (B, 3)
        x = F.avg_pool2d(x, 2)
    return torch.cat(found, 1)


def whitening(fitted):
    """Statistics of photographs (n, D) -> the function of rows (m, D) that gives them mean 0 and variance 1

    The norm of what it returns is Mahalanobis's distance.
    """
    mean = fitted.mean(0)
    std = fitted.std(0) + 1e-6
    correlation = torch.corrcoef(fitted.T)  # (D, D)
    # a tenth of the identity: a hundred numbers of a few hundred photographs give no whole covariance
    correlation = 0.9 * correlation + 0.1 * torch.eye(len(std))
    values, vectors = torch.linalg.eigh(correlation)
    vectors = vectors / values.sqrt()
    return lambda rows: (rows - mean) / std @ vectors


class Naturalness:
    """Share of photographs that are less typical: (B,3,H,W) -> (B,) in [0, 1]

    model: JSON lines of the photographs that are fitted; reference: of those that are ranked among.
    autoencoder: folder or repository of a pipeline, through whose autoencoder photographs pass first, where
    pictures come from a small one that blurs; "" for none.
    """

    def __init__(self, model, device="cpu", *, reference, autoencoder=""):
        self.paths = model, reference
        self.vae = None
        if autoencoder:
            self.vae = load_frozen(AutoencoderKL, autoencoder, device, subfolder="vae")
        self.device = device
        # pictures of a run have one size
        self.fitted = lru_cache(1)(self.fit)

    @torch.no_grad()
    def photographs(self, path, shape):
        """Statistics of the photographs of a list: (n, D)"""
        images, _ = read_photos(path, shape)  # (n,3,H,W)
        if self.vae:
            images = reconstruct(self.vae, images, self.device, 64)
        rows = [statistics(part.to(self.device)).cpu() for part in images.split(64)]
        return torch.cat(rows)

    def fit(self, shape):
        """shape (H, W) -> the whitening of photographs, and log distances (n,) of the reference

        All photographs are fitted. Each half of the reference is measured by a fit without it, or it would
        stand nearer than a picture can.
        """
        fitted, others = (self.photographs(path, shape) for path in self.paths)
        halves = others[::2], others[1::2]
        distances = []
        for half, other in (halves, halves[::-1]):
            whiten = whitening(torch.cat([fitted, other]))
            distances.append(whiten(half).norm(dim=1).log())
        return whitening(torch.cat([fitted, others])), torch.cat(distances)

    def features(self, images):
        """Whitened statistics, which KID compares: (B,3,H,W) -> (B, D)"""
        whiten, _ = self.fitted(images.shape[2:])
        return whiten(statistics(images.to(self.device)).cpu())

    def __call__(self, images, prompts):
        distance = self.features(images).norm(dim=1, keepdim=True).log()  # (B, 1)
        _, others = self.fitted(images.shape[2:])
        return torch.sigmoid((others - distance) / SOFTNESS).mean(1)  # (B,)
