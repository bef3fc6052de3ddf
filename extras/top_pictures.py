"""The nine images of the test set, and the places in them, that a feature map responds to most, each with the
pattern that it responded to there (Zeiler, Fergus 2013, https://arxiv.org/abs/1311.2901, figure 2). For a
network of photographs, the nine in the folder that --data names.

python -m extras.top_pictures --layer conv4_x --map 7,43"""

import torch

from common import cli, data, figures, inside, responses
from common.images import Photographs
from common.network import network_from_flags
from common.page.client import save_figure


@cli.command
def main(argv=None):
    parser = cli.parser(__doc__, "network", "data", "layer", "map", "method", "out", "port", map="0")
    args = parser.parse_args(argv)
    network = network_from_flags(args)
    if network.photographs:
        everything = Photographs(args.data, network.crop)
        names = [everything.name(index) for index in range(len(everything))]
    else:
        dataset = data.load(args.dataset, args.data, network.classes, ["test"])
        everything, names = dataset.test_images, [network.classes[label] for label in dataset.test_labels]
    (maps,) = inside.feature_maps(network.model, network.preprocess(everything[0]), args.layer)
    channels = inside.choose_maps(maps, args.map, one_image=False)  # an error before the long search
    batch = 4 if network.photographs else 25  # photographs are many and large: they must not fill the memory
    found = responses.cached_strongest(network, everything, batch=batch)[args.layer]
    for channel in channels:
        figure = draw(network, everything, names, found, args.layer, channel, args.method)
        save_figure(figure, args, f"top_pictures_{args.layer}_map{channel}.png")


def draw(network, everything, names, found, layer, channel, method="guided"):
    """A figure of the nine of all images, uint8 [N, 3, S, S] or `Photographs`, that map `channel` responds to
    most. `names` are the classes of the images; `found` is what `responses.strongest` has of a layer."""
    values, indices, positions = (tensor[channel] for tensor in found[:3])
    images, places = torch.stack([everything[int(index)] for index in indices]), []
    (maps,) = inside.feature_maps(network.model, network.preprocess(images[0]), layer)
    seen = responses.crops(network, layer, maps.shape[3], images, positions)
    for image, index, position, (crop, box) in zip(images, indices, positions, seen):
        x, (top, left, bottom, right) = network.preprocess(image), box
        how = layer, channel, method, int(position)
        pattern = inside.reconstruct(network.model, x, *how)
        _, correlation = inside.control(network.model, x, pattern, *how)
        scale = f"{figures.describe_scale(pattern)}\ncontrol: {correlation:.2f}"
        pattern = figures.pattern_image(pattern.cpu())[:, top:bottom, left:right]
        places.append((crop, pattern, names[index], scale))
    return nine_and_nine(places, values, channel, layer, method)


def nine_and_nine(places, values, channel, layer, method):
    """A figure of two 3×3 grids: what map `channel` saw in its `places`, and the patterns there. A place is
    (image [3, h, w], pattern [3, h, w], both in 0 … 1, class, the pattern's scale and control in words)."""
    figure = figures.Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(f"What map {channel} of {layer} responds to most, of all images")
    how = inside.METHOD_NAMES[method]
    titles = "what it sees there, and its activation", f"the pattern in it, by {how} (grey is zero)"
    for i, (part, title) in enumerate(zip(figure.subfigures(1, 2), titles)):
        part.suptitle(title, fontsize=10)
        cells = part.subplots(3, 3).flat
        for axes in cells[len(places) :]:
            axes.set_axis_off()
        for axes, place, value in zip(cells, places, values):
            figures.show(axes, place[i])
            axes.set_xlabel(place[3] if i else f"{place[2]}, {value:.2f}", fontsize=8)
    stages = " and ".join(inside.random_stages(layer))
    text = f"""Control: the rank correlation with the pattern of this network with random weights in {stages},
    in the rectangle that has 90 % of the pattern. Above 0.6, a pattern mostly shows edges and areas of the
    image itself there."""
    return figures.explain(figure, text)


if __name__ == "__main__":
    main()
