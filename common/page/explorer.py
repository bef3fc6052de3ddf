"""A visdom page to look inside a network with: choose a layer, an image and a method, double-click a map."""

import math
import random
import time

import matplotlib
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from common import cli, data, figures, inside
from common.device import select_device
from common.network import load_network
from common.page import assets, client

GRID, PANE = 480, 530  # pixels: the side of the grid of maps; its pane's height, a multiple of 15 less 10
LISTED = 100  # test images to choose from by name; the others come at random


class Explorer:
    """The panes, drawn anew when something is chosen."""

    def __init__(self, network, images, labels, page):
        self.network, self.images, self.labels, self.page = network, images, labels, page
        self.layer, self.index, self.method = "conv5_x", 0, "guided"
        self.refresh()
        page.register_event_handler(self.on_property, "Choose")
        page.register_event_handler(self.on_click, "Maps")

    def on_property(self, event):
        """Something was chosen in the pane "Choose"."""
        if event["event_type"] != "PropertyUpdate":
            return
        if event["propertyId"] < len(self.choices):
            attribute, values = list(self.choices.items())[event["propertyId"]]
            setattr(self, attribute, values[int(event["value"])])
        else:  # the button
            self.index = random.randrange(len(self.images))
        self.refresh()

    def on_click(self, event):
        """The grid of maps was double-clicked."""
        place = event.get("image_coord") or {}
        if event["event_type"] != "Click" or place.get("x") is None:
            return
        column, row = int(place["x"] // self.cell), int((place["y"] - self.above) // self.cell)
        channel = row * self.columns + column
        if column < self.columns and 0 <= channel < self.maps.shape[1] and channel != self.channel:
            self.show_map(channel)

    def refresh(self):
        """Draws everything, for the image and the layer that are chosen, and the strongest map there."""
        listed = sorted({*range(min(LISTED, len(self.images))), self.index})
        names = [f"{i}: {self.network.classes[self.labels[i]]}" for i in listed]
        self.choices = dict(layer=inside.STAGES, index=listed, method=list(inside.RELU_BACKWARD))
        fields = [
            dict(type="select", name=attribute, values=values, value=values.index(getattr(self, attribute)))
            for attribute, values in self.choices.items()
        ]
        fields[1] |= dict(name="test image", values=names)
        # No field to type in: where a pane has an image, visdom swallows every key.
        fields.append(dict(type="button", name="or any test image", value="at random"))
        self.page.properties(fields, win="Choose", opts=dict(title="Choose", width=280, height=180))
        image = self.images[self.index]
        self.x = self.network.preprocess(image)
        with torch.no_grad():
            (self.maps,) = inside.feature_maps(self.network.model, self.x, self.layer)
        caption = f"test image {names[listed.index(self.index)]};<br>{self.network.prediction(self.x)}"
        client.draw_images(self.page, "Image", [image], [caption], 190, 11, width=205, height=260)
        self._draw_grid()
        self.show_map(*inside.choose_maps(self.maps, "strongest:1"))

    def _draw_grid(self):
        count = self.maps.shape[1]
        self.columns = math.ceil(math.sqrt(count))
        self.cell = GRID // self.columns
        cells = F.interpolate(self.maps, self.cell - 1)[0].cpu()
        tiles = make_grid(cells[:, None], self.columns, 1, pad_value=math.nan)[0, 1:, 1:]
        sheet = torch.full((GRID, GRID), math.nan)  # the pane keeps its first size
        sheet[: tiles.shape[0], : tiles.shape[1]] = tiles
        # visdom centres the image below the pane's title of 15 px, or visdom 0.2 as if there were none.
        self.above = (PANE - GRID - (0 if assets.VISDOM_0_2 else 15)) / 2
        title = f"The {count} maps of {self.layer}: double-click one"  # a pane's first click only chooses it
        opts = dict(title=title, width=GRID, height=PANE - 15)
        self.page.image(heat_map(sheet).numpy(), win="Maps", opts=opts)

    def show_map(self, channel):
        """The map, its column in the chart, and the pattern that it responded to."""
        self.channel = channel
        pattern = inside.reconstruct(self.network.model, self.x, self.layer, channel, self.method)
        pattern = (255 * figures.pattern_image(pattern)).to(torch.uint8)
        caption = f"what map {channel} of {self.layer} responded to, by {inside.METHOD_NAMES[self.method]}"
        captions = [caption, inside.describe_map(self.maps, self.layer, channel)]
        images = [pattern, heat_map(self.maps[0, channel])]
        client.draw_images(self.page, "Map and pattern", images, captions, 190, 11, width=205, height=520)
        activations = inside.mean_activations(self.maps).cpu()
        mark = dict(x=channel, y=float(activations[channel]), text=f"map {channel}", showarrow=False)
        mark |= dict(font=dict(color="#b03a16"), yshift=9, bgcolor="white")
        options = dict(size=(495, 250), bargap=0, annotations=[mark])
        client.draw_bars(self.page, "Mean activations", activations, "mean activation", channel, **options)


def heat_map(values):
    """[h, w] from 0 to the largest value as an image, uint8 [3, h, w] on the CPU; NaN is white."""
    values = values / values.nan_to_num().max().clamp(min=1e-12)
    colors = matplotlib.colormaps["inferno"].with_extremes(bad="white")
    return torch.from_numpy(colors(values.cpu().numpy(), bytes=True)[..., :3]).permute(2, 0, 1)


def explore(args):
    """Opens the page and answers it until it is interrupted. Raises `UserError`."""
    port, network = args.port, load_network(args.weights, args.dataset, select_device(args.device))
    dataset = data.load(args.dataset, args.data, network.classes)
    assets.ensure()
    server = None if client.is_listening(port) else client.start_server(port)
    try:
        while not client.is_listening(port):
            if server.poll() is not None:
                raise cli.UserError(f"no visdom server starts on port {port}: --port names another")
            time.sleep(0.2)
        with cli.stop_signals("closing the page …") as signals:
            page = client.connect(port, "explore", events=True)
            Explorer(network, dataset.test_images, dataset.test_labels, page)
            print(f"look inside: {client.address(port)}/env/explore (Ctrl-C ends it)", flush=True)
            while not signals:
                time.sleep(1)
                if not client.is_listening(port):
                    raise cli.UserError("the visdom server has ended, and the page with it: start this again")
    except ConnectionError:
        raise cli.UserError(f"the visdom server on port {port} does not answer: --port names another")
    finally:
        client.stop_server(server)
