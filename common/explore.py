"""A visdom page to look inside a network with: choose a layer, a picture and a method, click a map."""

import math
import time

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from common import cli, data, figures, inside, visdom_files
from Myvisdom import address, connect, draw, end_server, listening, png, start_server

LAYERS = inside.STAGES
METHODS = list(inside.RELU_BACKWARD)
SIDE = 480  # pixels of the grid of maps, about


class Explorer:
    """The panes, drawn anew when something is chosen."""

    def __init__(self, network, images, labels, client):
        self.network, self.images, self.labels, self.client = network, images, labels, client
        self.layer, self.number, self.method = "conv5_x", 0, "guided"
        self.look()
        client.register_event_handler(self.on_property, "Choose")
        client.register_event_handler(self.on_click, "Maps")

    def on_property(self, event):
        if event["event_type"] != "PropertyUpdate":
            return
        try:
            value = int(float(event["value"]))
        except ValueError:  # half typed
            return
        if event["propertyId"] == 0:
            self.layer = LAYERS[value]
        elif event["propertyId"] == 1:
            self.number = min(max(value, 0), len(self.images) - 1)
        else:
            self.method = METHODS[value]
        self.look()

    def on_click(self, event):
        place = event.get("image_coord") or {}
        if event["event_type"] != "Click" or place.get("x") is None:
            return
        column, row = int(place["x"] // self.cell), int((place["y"] - self.above) // self.cell)
        chosen = row * self.columns + column
        if column < self.columns and 0 <= chosen < self.maps.shape[1]:
            self.show_map(chosen)

    def look(self):
        """Everything, for the picture and the layer that are chosen, and the map that is strongest there."""
        self.client.properties(
            [
                dict(type="select", name="layer", value=LAYERS.index(self.layer), values=LAYERS),
                dict(type="number", name="test picture", value=str(self.number)),
                dict(type="select", name="method", value=METHODS.index(self.method), values=METHODS),
            ],
            win="Choose",
            opts=dict(title="Choose", width=280, height=150),
        )
        self.x = self.network.prepare(self.images[self.number])
        with torch.no_grad():
            (self.maps,) = inside.feature_maps(self.network.model, self.x, self.layer)
        label = self.network.classes[self.labels[self.number]]
        said = inside.prediction(self.network, self.x)
        shown = f"test picture {self.number}: {label};<br>{said}"
        self._pictures("Picture", (self.images[self.number], shown))
        self._draw_maps()
        self.show_map(inside.choose_map(self.maps))

    def _draw_maps(self):
        count = self.maps.shape[1]
        self.columns = math.ceil(math.sqrt(count))
        self.cell = SIDE // self.columns
        cells = F.interpolate(self.maps, self.cell - 1)[0].cpu()  # a line between them
        sheet = coloured(figures.tile(cells.numpy(), self.columns, 1), float(cells.max()))
        # visdom makes panes a multiple of 15 px less 10 high, with 15 px of title, and centres the picture
        # as if there were none
        side = self.cell * self.columns
        height = 15 * math.ceil((side + 60) / 15) - 10
        self.above = (height - side) / 2
        opts = dict(title=f"The {count} maps of {self.layer}: click one", width=side, height=height - 15)
        self.client.image(sheet, win="Maps", opts=opts)

    def show_map(self, chosen):
        """The map, its column in the chart, and the pattern that it responded to."""
        strengths = inside.strengths(self.maps).cpu()
        feature_map = self.maps[0, chosen].cpu()
        pattern = inside.reconstruct(self.network.model, self.x, self.layer, chosen, self.method).cpu()
        pattern = (255 * figures.neutral(pattern)).to(torch.uint8)
        responded = f"what map {chosen} of {self.layer} responded to, by {inside.METHOD_NAMES[self.method]}"
        self._pictures(
            "Map and pattern",
            (pattern, responded),
            (
                torch.from_numpy(coloured(feature_map.numpy(), float(feature_map.max()))),
                f"map {chosen} of {self.layer}, mean activation {strengths[chosen]:.3f}",
            ),
        )
        colours = ["#e4572e" if i == chosen else "#4c78a8" for i in range(len(strengths))]
        hover = "map %{x}: %{y:.4f}<extra></extra>"
        bars = dict(type="bar", y=strengths.tolist(), hovertemplate=hover, marker=dict(color=colours))
        mark = dict(x=chosen, y=float(strengths[chosen]), text=f"map {chosen}", font=dict(color="#b03a16"))
        draw(
            self.client, "Strengths", [bars], "feature map", "mean activation", (495, 250), bargap=0,
            annotations=[mark],
        )  # fmt: skip

    def _pictures(self, name, *pictures):
        """A pane of pictures, each uint8 [3, H, W] with its caption."""
        style = "width:190px;image-rendering:pixelated"
        content = "".join(
            f"<img src='{png(image)}' style='{style}'><div style='font-size:11px;height:50px'>{caption}</div>"
            for image, caption in pictures
        )
        self.client.text(content, win=name, opts=dict(title=name, width=205, height=260 * len(pictures)))


def coloured(values, highest):
    """[h, w] from 0 to `highest` as uint8 [3, h, w]; NaN is white."""
    colours = matplotlib.colormaps["inferno"].with_extremes(bad="white")
    return colours(np.ma.masked_invalid(values / max(highest, 1e-12)), bytes=True)[..., :3].transpose(2, 0, 1)


def explore(args):
    """Opens the page and answers it until it is interrupted. Raises `UserError`."""
    network = inside.load_network(args.weights, args.dataset, cli.device(args.device))
    data.check_classes(args.dataset, network.classes)
    dataset = data.load(args.dataset, args.data)
    visdom_files.ensure()
    server = None if listening(args.port) else start_server(args.port)
    try:
        while not listening(args.port):
            if server.poll() is not None:
                raise cli.UserError(f"no visdom server starts on port {args.port}: --port names another")
            time.sleep(0.2)
        with cli.stop_signals() as signals:
            try:
                client = connect(args.port, "explore", use_incoming_socket=True)
                Explorer(network, dataset.test_images, dataset.test_labels, client)
            except ConnectionError:
                raise cli.UserError(
                    f"the visdom server on port {args.port} does not answer: --port names another"
                )
            print(f"look inside: {address(args.port)}/env/explore (Ctrl-C ends it)", flush=True)
            while not signals:
                time.sleep(0.2)
    finally:
        end_server(server)
