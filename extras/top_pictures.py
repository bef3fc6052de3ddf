"""The nine images of the test set, and the places in them, that a feature map responds to most, each with the
pattern that it responded to there (Zeiler, Fergus 2013, https://arxiv.org/abs/1311.2901, figure 2).

python -m extras.top_pictures --layer conv4_x --map 7,43"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import checkpoint, cli, data, figures, inside
from common.device import select_device
from common.network import load_network
from common.page.client import save_figure

CACHE = Path("runs/top_pictures")


@torch.inference_mode()
def strongest(network, images, batch=100):
    """For each stage: (values [maps, 9], images [maps, 9], positions [maps, 9] in the flattened map, and
    largest mean activations [maps]) over all `images`, uint8 [N, 3, S, S]; the strongest first."""
    found = {stage: [] for stage in inside.STAGES}
    for part in tqdm(images.split(batch), "looking at every test image", leave=False):
        stages = inside.feature_maps(network.model, network.preprocess(part), *inside.STAGES)
        for stage, maps in zip(inside.STAGES, stages):
            maps = maps.flatten(2).transpose(0, 1)  # [maps, images, positions]
            found[stage].append((*maps.max(2), maps.mean(2)))
    for stage, parts in found.items():
        peaks, positions, means = (torch.cat(tensors, 1).cpu() for tensors in zip(*parts))  # [maps, N] each
        values, indices = peaks.topk(min(9, len(images)))
        found[stage] = values, indices, positions.gather(1, indices), means.amax(1)
    return found


def cached_strongest(network, images):
    """`strongest`, from the disk if it was computed before for this network and these images."""
    preprocessing = torch.tensor([network.size, *network.mean, *network.std])
    tensors = [*network.model.state_dict().values(), images, preprocessing]
    digest = hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()
    return checkpoint.cached(CACHE / f"{digest[:16]}.pt", digest, lambda: strongest(network, images))


def crop_box(position, width, field, step, size):
    """(top, left, bottom, right): what a position of a map of that width sees of a size×size image."""
    row, column = (step * index for index in divmod(position, width))
    half = field // 2
    return max(0, row - half), max(0, column - half), min(size, row + half + 1), min(size, column + half + 1)


@cli.command
def main(argv=None):
    flags = "weights", "dataset", "data", "map", "method", "out", "device", "port"
    parser = cli.parser(__doc__, *flags, map="0")
    parser.add_argument("--layer", default="conv5_x", choices=inside.STAGES, help="default: conv5_x")
    args = parser.parse_args(argv)
    network = load_network(args.weights, args.dataset, select_device(args.device))
    dataset = data.load(args.dataset, args.data, network.classes)
    (maps,) = inside.feature_maps(network.model, network.preprocess(dataset.test_images[0]), args.layer)
    inside.choose_maps(maps, args.map)  # an error before the long search
    values, indices, positions, _ = cached_strongest(network, dataset.test_images)[args.layer]
    field, step = inside.receptive_field(network.model, args.layer)
    for channel in inside.choose_maps(values[None, ..., None], args.map):
        places = []
        for index, position in zip(indices[channel].tolist(), positions[channel].tolist()):
            image = dataset.test_images[index]
            x = network.preprocess(image)
            top, left, bottom, right = crop_box(position, maps.shape[3], field, step, network.size)
            pattern = inside.reconstruct(network.model, x, args.layer, channel, args.method, position).cpu()
            large = F.interpolate(image[None] / 255, network.size, mode="bilinear")[0]
            crops = (part[:, top:bottom, left:right] for part in (large, figures.pattern_image(pattern)))
            places.append((*crops, network.classes[dataset.test_labels[index]]))
        figure = nine_and_nine(places, values[channel], channel, args)
        save_figure(figure, args, f"top_pictures_{args.layer}_map{channel}.png")


def nine_and_nine(places, values, channel, args):
    """A figure of two 3×3 grids: what map `channel` saw in its `places`, and the patterns there. A place is
    (image [3, h, w], pattern [3, h, w], both in 0 … 1, class)."""
    figure = figures.Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(f"What map {channel} of {args.layer} responds to most, of all test images")
    how = inside.METHOD_NAMES[args.method]
    titles = "what it sees there, and its activation", f"the pattern in it, by {how} (grey is zero)"
    for i, (part, title) in enumerate(zip(figure.subfigures(1, 2), titles)):
        part.suptitle(title, fontsize=10)
        for axes, place, value in zip(part.subplots(3, 3).flat, places, values):
            figures.show(axes, place[i])
            axes.set_xlabel(f"{place[2]}, {value:.2f}", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
