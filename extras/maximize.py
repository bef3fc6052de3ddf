"""What would excite a feature map most: a picture that gradient ascent finds from noise, in frequencies and
colours that vary independently, and under small random transforms (Olah, Mordvintsev, Schubert 2017,
https://distill.pub/2017/feature-visualization).

python -m extras.maximize --layer conv4_x --map 7,43"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import cli, data, figures, inside
from extras.top_pictures import remembered

# Columns are colours that vary independently in CIFAR-10, as much as they do: brightness, blue to red, and
# green to purple. From the covariance of the pixels of 5,000 training pictures, the largest column to 1.
COLOURS = torch.tensor([[0.556, 0.190, -0.054], [0.577, 0.011, 0.101], [0.598, -0.188, -0.048]])


def noise(size, seed):
    """The frequencies of a nearly grey picture, [1, 3, size, size // 2 + 1, 2]: real and imaginary."""
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(1, 3, size, size // 2 + 1, 2, generator=generator)


def picture_of(values):
    """[1, 3, S, S] in 0 … 1, of values that ascent can change independently: frequencies, each scaled as
    natural pictures have it, of colours that vary independently too."""
    size = values.shape[2]
    frequencies = torch.fft.fftfreq(size)[:, None].hypot(torch.fft.rfftfreq(size)[None])
    spectrum = torch.view_as_complex(values) / frequencies.clamp(min=1 / size).to(values.device)
    image = torch.fft.irfft2(spectrum, (size, size), norm="ortho")
    return torch.einsum("rc,nchw->nrhw", COLOURS.to(values.device), image).sigmoid()


def jiggled(image, generator):
    """The picture turned by up to 5°, scaled by up to 5 % and moved by up to 8 of 224 px, at random."""
    turn, scale, right, down = (2 * torch.rand(4, generator=generator) - 1).tolist()
    turn, scale = math.radians(5 * turn), 1 + 0.05 * scale
    c, s = scale * math.cos(turn), scale * math.sin(turn)
    theta = torch.tensor([[[c, -s, right * 16 / 224], [s, c, down * 16 / 224]]], device=image.device)
    grid = F.affine_grid(theta, image.shape, align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


def mean_activation(network, image, layer, number, leak=0.0):
    """Of map `number` of `layer`, for an image [1, 3, S, S] in 0 … 1. With a `leak`, values below zero count
    by that share, so that a silent map has a gradient too."""
    relu = [m for m in network.model.get_submodule(layer).modules() if isinstance(m, nn.ReLU)][-1]
    before = []
    hook = relu.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    try:
        network.model(network.normalise(image))
    finally:
        hook.remove()
    return F.leaky_relu(before[0][0, number], leak).mean()


def maximize(network, layer, number, steps=200, seed=0):
    """(the picture [3, S, S] in 0 … 1 that excites map `number` of `layer`, its mean activation by it). The
    same seed gives the same picture, on a CPU to the last bit."""
    values = noise(network.size, seed).to(network.model.fc.weight.device).requires_grad_()
    optimizer = torch.optim.Adam([values], lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), f"exciting map {number} of {layer}", leave=False):
        goal = mean_activation(network, jiggled(picture_of(values), generator), layer, number, leak=0.01)
        (values.grad,) = torch.autograd.grad(-goal, values)
        optimizer.step()
    with torch.no_grad():  # ascent does not find the plain colour that some maps of conv1 like best
        colours = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], device=values.device)] * 3)
        plain = colours[:, :, None, None].expand(-1, -1, network.size, network.size)
        pictures = torch.cat((picture_of(values), plain))
        activations = [mean_activation(network, p[None], layer, number) for p in pictures]
        best = max(range(len(pictures)), key=activations.__getitem__)
        return pictures[best], float(activations[best])


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "out", "device", "port")
    add = parser.add_argument
    add("--layer", default="conv5_x", choices=inside.STAGES, help="default: conv5_x")
    add("--map", default="0", metavar="N", help="a map, or several as 7,43 (default: 0)")
    add("--seed", type=cli.number(int, 0, 2**31), default=0, metavar="N", help="of the noise (default: 0)")
    add("--steps", type=cli.number(int, 1), default=200, metavar="N", help="of ascent (default: 200)")
    args = parser.parse_args(argv)
    device = cli.device(args.device)
    if device.type == "mps":  # https://github.com/pytorch/pytorch/pull/169143: no gradient of grid_sample
        device = torch.device("cpu")
    network = inside.load_network(args.weights, args.dataset, device)
    black = network.prepare(torch.zeros(3, data.SIDE, data.SIDE, dtype=torch.uint8))
    (maps,) = inside.feature_maps(network.model, black, args.layer)
    if args.map.startswith("strongest"):  # of no picture
        raise cli.UserError("--map takes a number here, or several as 7,43")
    numbers = inside.choose_maps(maps, args.map)  # an error before the long look
    best = None
    if args.data != "data" or data.is_there(args.dataset, args.data):
        data.check_classes(args.dataset, network.classes)
        best = remembered(network, data.load(args.dataset, args.data).test_images)[args.layer][3]
    for number in numbers:
        picture, activation = maximize(network, args.layer, number, args.steps, args.seed)
        caption = f"mean activation {activation:.3f}"
        if best is not None:
            caption += f"; the best test picture has {best[number]:.3f}"
        figure = figures.picture(picture, f"What would excite map {number} of {args.layer} most", caption)
        figures.save(figure, args, f"maximize_{args.layer}_map{number}.png")
        print(f"map {number} of {args.layer}: {caption}")


if __name__ == "__main__":
    main()
