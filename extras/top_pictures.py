"""The nine pictures of the test set, and the places in them, that a feature map responds to most, each with
the pattern that it responded to there (Zeiler, Fergus 2013, https://arxiv.org/abs/1311.2901, figure 2).

python -m extras.top_pictures --layer conv4_x --map 7,43"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import checkpoint, cli, data, figures, inside

KEPT = 9  # pictures of a map
CACHE = Path("runs/top_pictures")


@torch.inference_mode()
def strongest(network, images, batch=100):
    """For each stage: (values [maps, 9], pictures [maps, 9], positions [maps, 9] in the flattened map, and
    largest mean activations [maps]) over all `images`, uint8 [N, 3, S, S]; the strongest first."""
    found = {}
    for first in tqdm(range(0, len(images), batch), "looking at every test picture", leave=False):
        x = network.prepare(images[first : first + batch])
        for stage, maps in zip(inside.STAGES, inside.feature_maps(network.model, x, *inside.STAGES)):
            maps = maps.flatten(2).transpose(0, 1)  # [maps, pictures, positions]
            values, positions = maps.max(2)
            pictures = torch.arange(first, first + len(x), device=x.device).expand_as(values)
            new, means = (values, pictures, positions), maps.mean(2).amax(1)
            if stage in found:
                *old, best = found[stage]
                new, means = [torch.cat(pair, 1) for pair in zip(old, new)], means.maximum(best)
            order = new[0].topk(min(KEPT, new[0].shape[1])).indices
            found[stage] = *(part.gather(1, order) for part in new), means
    return {stage: [part.cpu() for part in parts] for stage, parts in found.items()}


def remembered(network, images):
    """`strongest`, from the disk if it was computed before for this network and these pictures."""
    told = torch.tensor([network.size, *network.mean, *network.std])
    tensors = [*network.model.state_dict().values(), images, told]
    digest = hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()
    path = CACHE / f"{digest[:16]}.pt"
    try:
        return checkpoint.load(path)
    except cli.UserError:  # none there, or damaged
        found = strongest(network, images)
    try:
        cli.folder(CACHE)
        checkpoint.save(found, path)
    except cli.UserError as error:
        print(f"the next call looks at all pictures again: {error}")
    return found


def crop_box(position, width, field, step, size):
    """(top, left, bottom, right): what a position of a map of that width sees of a size×size picture."""
    centre = [step * int(index) for index in divmod(int(position), width)]
    low = [max(0, c - field // 2) for c in centre]
    high = [min(size, c + field // 2 + 1) for c in centre]
    return *low, *high


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "weights", "dataset", "data", "method", "out", "device", "port")
    parser.add_argument("--layer", default="conv5_x", choices=inside.STAGES, help="default: conv5_x")
    parser.add_argument("--map", default="0", metavar="N", help="a map, or several as 7,43 (default: 0)")
    args = parser.parse_args(argv)
    network = inside.load_network(args.weights, args.dataset, cli.device(args.device))
    data.check_classes(args.dataset, network.classes)
    dataset = data.load(args.dataset, args.data)
    (maps,) = inside.feature_maps(network.model, network.prepare(dataset.test_images[0]), args.layer)
    inside.choose_maps(maps, args.map)  # an error before the long look
    values, pictures, positions, _ = remembered(network, dataset.test_images)[args.layer]
    field, step = inside.receptive_field(network.model, args.layer)
    for number in inside.choose_maps(values[None, ..., None], args.map):
        places = []
        for picture, position in zip(pictures[number].tolist(), positions[number].tolist()):
            image = dataset.test_images[picture]
            x = network.prepare(image)
            top, left, bottom, right = crop_box(position, maps.shape[3], field, step, network.size)
            pattern = inside.reconstruct(network.model, x, args.layer, number, args.method, position).cpu()
            large = F.interpolate(image[None] / 255, network.size, mode="bilinear")[0]
            crops = (part[:, top:bottom, left:right] for part in (large, figures.neutral(pattern)))
            places.append((*crops, network.classes[dataset.test_labels[picture]]))
        figure = nine_and_nine(places, values[number], number, args)
        figures.save(figure, args, f"top_pictures_{args.layer}_map{number}.png")


def nine_and_nine(places, values, number, args):
    """A figure of two 3×3 grids: what map `number` saw in its `places`, and the patterns there. A place is
    (picture [3, h, w], pattern [3, h, w], both in 0 … 1, class)."""
    figure = figures.Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(f"What map {number} of {args.layer} responds to most, of all test pictures")
    how = inside.METHOD_NAMES[args.method]
    titles = "what it sees there, and its activation", f"the pattern in it, by {how} (grey is zero)"
    for i, (part, title) in enumerate(zip(figure.subfigures(1, 2), titles)):
        part.suptitle(title, fontsize=10)
        for axis, place, value in zip(part.subplots(3, 3).flat, places, values):
            figures.show(axis, place[i])
            axis.set_xlabel(f"{place[2]}, {value:.2f}", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
