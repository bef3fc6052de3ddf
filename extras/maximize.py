"""What would excite a feature map most: an image that gradient ascent finds from noise, in frequencies and
colours that vary independently, and under small random transforms (Olah, Mordvintsev, Schubert 2017,
https://distill.pub/2017/feature-visualization), or one of eight plain colours, if that excites it more.

python -m extras.maximize --layer conv4_x --map 7,43"""

import math

import torch
import torch.nn.functional as F

from common import cli, data, figures, inside, responses
from common.device import select_device
from common.network import network_from_flags
from common.page.client import save_figure

# Columns are colours that vary independently in CIFAR-10, as much as they do: brightness, blue to red, and
# green to purple. From the covariance of the pixels of 5,000 training images, the largest column to 1.
COLORS = torch.tensor([[0.556, 0.190, -0.054], [0.577, 0.011, 0.101], [0.598, -0.188, -0.048]])


def random_spectrum(size, seed):
    """The frequencies of a nearly grey image, [1, 3, size, size // 2 + 1, 2]: real and imaginary."""
    return 0.01 * torch.randn(1, 3, size, size // 2 + 1, 2, generator=torch.Generator().manual_seed(seed))


def to_image(spectrum):
    """The image [1, 3, S, S] in 0 … 1 of a spectrum; frequencies are scaled as natural images have them."""
    size = spectrum.shape[2]
    frequencies = torch.fft.fftfreq(size)[:, None].hypot(torch.fft.rfftfreq(size)[None])
    scaled = torch.view_as_complex(spectrum) / frequencies.clamp(min=1 / size).to(spectrum.device)
    image = torch.fft.irfft2(scaled, (size, size), norm="ortho")
    return torch.einsum("rc,nchw->nrhw", COLORS.to(spectrum.device), image).sigmoid()


def jitter(image, generator):
    """The image [1, 3, S, S], turned by up to 5°, scaled by up to 5 % and moved by up to 8 of 224 px at
    random."""
    turn, scale, right, down = (2 * torch.rand(4, generator=generator) - 1).tolist()
    turn, scale = math.radians(5 * turn), 1 + 0.05 * scale
    c, s = scale * math.cos(turn), scale * math.sin(turn)
    theta = torch.tensor([[[c, -s, right * 16 / 224], [s, c, down * 16 / 224]]], device=image.device)
    grid = F.affine_grid(theta, image.shape, align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


def mean_activation(network, image, layer, channel, leak=0.0):
    """The mean activation, a scalar tensor, of map `channel` of `layer` for an image [1, 3, S, S] in 0 … 1;
    `leak` is the slope of its ReLU below 0."""
    relu = [m for m in network.model.get_submodule(layer).modules() if isinstance(m, torch.nn.ReLU)][-1]
    before = []  # the maps before that ReLU, [1, channels, h, w]
    with relu.register_forward_pre_hook(lambda module, inputs: before.extend(inputs)):
        network.model(network.normalize(image))
    return F.leaky_relu(before[0][0, channel], leak).mean()


def maximize(network, layer, channel, steps=200, seed=0):
    """(the image [3, S, S] in 0 … 1 that excites map `channel` of `layer`, its mean activation by it). The
    same seed gives the same image, on a CPU to the last bit."""
    spectrum = random_spectrum(network.size, seed).to(network.model.fc.weight.device).requires_grad_()
    optimizer = torch.optim.Adam([spectrum], lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in cli.progress_bar(range(steps), f"exciting map {channel} of {layer}"):
        image = jitter(to_image(spectrum), generator)
        goal = mean_activation(network, image, layer, channel, leak=0.01)  # a silent map has a gradient too
        (spectrum.grad,) = torch.autograd.grad(-goal, spectrum)
        optimizer.step()
    with torch.no_grad():  # ascent does not find the plain colour that some maps of conv1 like best
        colors = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], device=spectrum.device)] * 3)
        plain = colors[:, :, None, None].expand(-1, -1, network.size, network.size)
        images = torch.cat((to_image(spectrum), plain))
        found = [(image, float(mean_activation(network, image[None], layer, channel))) for image in images]
    return max(found, key=lambda pair: pair[1])


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "data", "layer", "map", "out", "port", map="0")
    add = parser.add_argument
    whole = cli.number(int, 0, 2**31)
    add("--seed", type=whole, default=0, metavar="N", help="seed of the noise (default: 0)")
    add("--steps", type=cli.number(int, 1), default=200, metavar="N", help="steps of ascent (default: 200)")
    args = parser.parse_args(argv)
    if select_device(args.device).type == "mps":
        args.device = "cpu"  # https://github.com/pytorch/pytorch/pull/169143: no gradient of grid_sample
    network = network_from_flags(args)
    black = network.preprocess(torch.zeros(3, data.SIDE, data.SIDE, dtype=torch.uint8))
    (maps,) = inside.feature_maps(network.model, black, args.layer)
    channels = inside.choose_maps(maps, args.map, one_image=False)  # an error before the long search
    best = None
    if not network.photographs and data.is_present(args.dataset, args.data):
        dataset = data.load(args.dataset, args.data, network.classes, ["test"])
        best = responses.cached_strongest(network, dataset.test_images)[args.layer][3].amax(1)
    for channel in channels:
        image, activation = maximize(network, args.layer, channel, args.steps, args.seed)
        reached = None if best is None else best[channel]
        figure, caption = draw(image, args.layer, channel, activation, reached)
        save_figure(figure, args, f"maximize_{args.layer}_map{channel}.png")
        print(f"map {channel} of {args.layer}: {caption}")


def draw(image, layer, channel, activation, best=None):
    """(a figure of what `maximize` returned, its caption); `best` is the largest of the test set."""
    caption = f"mean activation {activation:.3f}"
    if best is not None:
        caption += f"; the best test image has {best:.3f}"
    title = f"What would excite map {channel} of {layer} most"
    return figures.side_by_side([image], [caption], title), caption


if __name__ == "__main__":
    main()
