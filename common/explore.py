"""A visdom page to look inside a network with: choose a layer, a picture and a method, double-click a map."""

import math
import random
import time

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import visdom

from common import cli, data, figures, inside, visdom_files
from Myvisdom import address, connect, draw_bars, end_server, listening, png, start_server

METHODS = list(inside.RELU_BACKWARD)
SIDE = 480  # pixels of the grid of maps
LISTED = 100  # test pictures to choose from by name; the others come at random


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
        name, value = self.properties[event["propertyId"]]["name"], event["value"]
        if name == "layer":
            self.layer = inside.STAGES[int(value)]
        elif name == "method":
            self.method = METHODS[int(value)]
        elif name == "test picture":
            self.number = self.numbers[int(value)]
        else:
            self.number = random.randrange(len(self.images))
        self.look()

    def on_click(self, event):
        place = event.get("image_coord") or {}
        if event["event_type"] != "Click" or place.get("x") is None:
            return
        column, row = int(place["x"] // self.cell), int((place["y"] - self.above) // self.cell)
        chosen = row * self.columns + column
        if column < self.columns and 0 <= chosen < self.maps.shape[1] and chosen != self.chosen:
            self.show_map(chosen)

    def look(self):
        """Everything, for the picture and the layer that are chosen, and the map that is strongest there."""
        self.numbers = sorted({*range(min(LISTED, len(self.images))), self.number})
        names = [f"{n}: {self.network.classes[self.labels[n]]}" for n in self.numbers]

        def choice(name, values, chosen):
            return dict(type="select", name=name, value=chosen, values=values)

        self.properties = [  # no field to type in: where a pane has a picture, visdom swallows every key
            choice("layer", inside.STAGES, inside.STAGES.index(self.layer)),
            choice("test picture", names, self.numbers.index(self.number)),
            dict(type="button", name="or any other", value="at random"),
            choice("method", METHODS, METHODS.index(self.method)),
        ]
        opts = dict(title="Choose", width=280, height=180)
        self.client.properties(self.properties, win="Choose", opts=opts)
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
        tiles = figures.tile(cells.numpy(), self.columns, 1)
        sheet = np.full((SIDE, SIDE), np.nan)  # as large for every layer: visdom keeps a pane as it was first
        sheet[: tiles.shape[0], : tiles.shape[1]] = tiles
        sheet = coloured(sheet, float(cells.max()))
        # visdom makes panes a multiple of 15 px less 10 high, with 15 px of title, and centres the picture
        # below that, or in visdom 0.2 as if there were none.
        height = 15 * math.ceil((SIDE + 60) / 15) - 10
        self.above = (height - SIDE - (0 if visdom.__version__.startswith("0.2.") else 15)) / 2
        title = f"The {count} maps of {self.layer}: double-click one"  # a pane's first click only chooses it
        opts = dict(title=title, width=SIDE, height=height - 15)
        self.client.image(sheet, win="Maps", opts=opts)

    def show_map(self, chosen):
        """The map, its column in the chart, and the pattern that it responded to."""
        self.chosen, strengths = chosen, inside.strengths(self.maps).cpu()
        feature_map = self.maps[0, chosen].cpu()
        pattern = inside.reconstruct(self.network.model, self.x, self.layer, chosen, self.method).cpu()
        pattern = (255 * figures.neutral(pattern)).to(torch.uint8)
        responded = f"what map {chosen} of {self.layer} responded to, by {inside.METHOD_NAMES[self.method]}"
        shown = torch.from_numpy(coloured(feature_map.numpy(), float(feature_map.max())))
        about = f"map {chosen} of {self.layer}, mean activation {strengths[chosen]:.3f}"
        self._pictures("Map and pattern", (pattern, responded), (shown, about))
        mark = dict(x=chosen, y=float(strengths[chosen]), text=f"map {chosen}", font=dict(color="#b03a16"))
        mark |= dict(showarrow=False, yshift=9, bgcolor="white")
        draw_bars(
            self.client, "Strengths", strengths, chosen, "mean activation", (495, 250), bargap=0,
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
        with cli.stop_signals("closing the page …") as signals:
            try:
                client = connect(args.port, "explore", events=True)
                Explorer(network, dataset.test_images, dataset.test_labels, client)
            except ConnectionError:
                raise cli.UserError(
                    f"the visdom server on port {args.port} does not answer: --port names another"
                )
            print(f"look inside: {address(args.port)}/env/explore (Ctrl-C ends it)", flush=True)
            while not signals:
                time.sleep(1)
                if not listening(args.port):
                    raise cli.UserError("the visdom server has ended, and the page with it: start this again")
    finally:
        end_server(server)
