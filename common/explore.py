"""A visdom page to look inside a network with: choose a layer, a picture and a method, click a map."""

import math
import time

import matplotlib
import torch
import torch.nn.functional as F

from common import cli, data, inside, visdom_files
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
        self._picture("Picture", self.images[self.number], f"test picture {self.number}: {label};<br>{said}")
        self._draw_maps()
        self.show_map(inside.choose_map(self.maps))

    def _draw_maps(self):
        count = self.maps.shape[1]
        self.columns = math.ceil(math.sqrt(count))
        self.cell = SIDE // self.columns
        cells = F.interpolate(self.maps, self.cell - 1)[0] / self.maps.max().clamp(min=1e-12)
        cells = F.pad(cells, (0, 1, 0, 1), value=1.0)  # a line between them
        cells = torch.cat([cells, cells.new_ones(self.columns**2 - count, self.cell, self.cell)])
        sheet = (
            cells.view(self.columns, self.columns, self.cell, self.cell)
            .transpose(1, 2)
            .flatten(2)
            .flatten(0, 1)
        )
        coloured = matplotlib.colormaps["inferno"](sheet.cpu().numpy())[..., :3]
        title = f"The {count} maps of {self.layer}: click one"
        side = sheet.shape[0]
        # visdom makes panes a multiple of 15 px less 10 high, with 15 px of title, and centres the picture
        # as if there were none
        height = 15 * math.ceil((side + 60) / 15) - 10
        self.above = (height - side) / 2
        opts = dict(title=title, width=side, height=height - 15)
        self.client.image(coloured.transpose(2, 0, 1), win="Maps", opts=opts)

    def show_map(self, chosen):
        """The map, its column in the chart, and the pattern that it responded to."""
        shown = self.maps[0, chosen] / self.maps[0, chosen].max().clamp(min=1e-12)
        coloured = torch.tensor(matplotlib.colormaps["inferno"](shown.cpu().numpy())[..., :3]).permute(
            2, 0, 1
        )
        strengths = inside.strengths(self.maps).cpu()
        caption = f"map {chosen} of {self.layer}, mean activation {strengths[chosen]:.3f}"
        self._picture("Map", (255 * coloured).to(torch.uint8), caption)
        colours = ["#e4572e" if i == chosen else "#4c78a8" for i in range(len(strengths))]
        hover = "map %{x}: %{y:.4f}<extra></extra>"
        bars = dict(type="bar", y=strengths.tolist(), hovertemplate=hover, marker=dict(color=colours))
        draw(self.client, "Strengths", [bars], "feature map", "mean activation", (495, 250), bargap=0)
        pattern = inside.reconstruct(self.network.model, self.x, self.layer, chosen, self.method).cpu()
        pattern = 127.5 + 127.5 * pattern / pattern.abs().max().clamp(min=1e-12)
        caption = f"what map {chosen} of {self.layer} responded to, by {inside.METHOD_NAMES[self.method]}"
        self._picture("Pattern", pattern.to(torch.uint8), caption)

    def _picture(self, name, image, caption):
        style = "width:190px;image-rendering:pixelated"
        content = f"<img src='{png(image)}' style='{style}'><div style='font-size:11px'>{caption}</div>"
        self.client.text(content, win=name, opts=dict(title=name, width=205, height=265))


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
