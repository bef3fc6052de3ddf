"""A visdom page to look inside a network with: choose a layer, an image and a method, double-click a map."""

import copy
import html
import math
import random
import threading
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from common import cli, data, figures, inside, responses
from common.images import EXTENSIONS, read_image
from common.network import network_from_flags
from common.page import assets, client, front

# Pixels. Three columns of panes fill a window of 1280×800. A pane's height is a multiple of 15, less 10; what
# visdom is given for it is 15 less than that.
LEFT, GRID, RIGHT = 280, 530, 430  # widths; GRID is the side of the grid of maps, and the width of its column
PANE = 560  # the height of the pane with the grid
LISTED = 100  # test images to choose from by name; the others come at random
PHOTOGRAPHS = {"a cat": "chelsea.png", "a horse": "horse.png", "a rocket": "rocket.jpg"}  # of scikit-image
TYPE = "<code>python Myvisdom.py --explore</code>"


class Explorer:
    """The panes, drawn anew when something is chosen. `images` is {name: uint8 [3, S, S], or the path of an
    image file, which is read when it is chosen}; `prepare` adds test images. The lock is held while a choice
    or click is answered: what goes on in the background waits for it."""

    def __init__(self, network, images, page):
        self.network, self.images, self.page = network, images, page
        self.layer, self.image, self.method = "conv5_x", next(iter(images)), "guided"
        self.test_images = self.test_labels = self.found = None
        self.note, self.lock, self.closing = "", threading.Lock(), False
        self.refresh()
        page.register_event_handler(self.on_property, "Choose")
        page.register_event_handler(self.on_click, "Maps")

    def on_property(self, event):
        """Something was chosen in the pane "Choose"."""
        if event["event_type"] != "PropertyUpdate":
            return
        with self.lock:
            before = self.image
            if event["propertyId"] < len(self.choices):
                attribute, values = list(self.choices.items())[event["propertyId"]]
                setattr(self, attribute, values[int(event["value"])])
            else:  # the button
                count = len(self.images if self.test_images is None else self.test_images)
                index = random.randrange(count)
                self.image = (
                    list(self.images)[index] if self.test_images is None else self._add_test_image(index)
                )
            try:
                self.refresh()
            except cli.UserError as error:  # no image, though it is called one
                self.image = before
                self._draw_choices()
                self.page.text(html.escape(str(error)), win="Image", opts=dict(title="Image"))

    def on_click(self, event):
        """The grid of maps was double-clicked."""
        place = event.get("image_coord") or {}
        if event["event_type"] != "Click" or place.get("x") is None:
            return
        with self.lock:
            column, row = int(place["x"] // self.cell), int((place["y"] - self.above) // self.cell)
            channel = row * self.columns + column
            if column < self.columns and 0 <= channel < self.maps.shape[1] and channel != self.channel:
                self.channel = channel
                self._draw_pattern()
                self._draw_activations()
                self._draw_responses()

    def refresh(self):
        """Draws everything, for the image and the layer that are chosen, and the strongest map there. Raises
        `UserError` if the image cannot be read."""
        image = self.images[self.image]
        image = read_image(image, self.network.crop) if isinstance(image, Path) else image
        self.x = self.network.preprocess(image)
        with torch.no_grad():
            (self.maps,) = inside.feature_maps(self.network.model, self.x, self.layer)
        caption = f"{html.escape(self.image)};<br>{html.escape(self.network.prediction(self.x))}"
        self._draw_choices()  # visdom puts each pane into the first row that has room, so the order counts
        self._draw_grid()
        (self.channel,) = inside.choose_maps(self.maps, "strongest:1")
        self._draw_pattern()
        client.draw_images(self.page, "Image", [image], [caption], 190, 11, width=LEFT, height=230)
        self._draw_activations()
        self._draw_responses()

    def _draw_choices(self):
        self.choices = dict(layer=inside.STAGES, image=list(self.images), method=list(inside.RELU_BACKWARD))
        fields = [
            dict(type="select", name=attribute, values=values, value=values.index(getattr(self, attribute)))
            for attribute, values in self.choices.items()
        ]
        # No field to type in: where a pane has an image, visdom swallows every key.
        fields.append(dict(type="button", name="or one", value="at random"))
        self.page.properties(fields, win="Choose", opts=dict(title="Choose", width=LEFT, height=155))

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

    def _draw_pattern(self):
        """The pattern that the map responded to, and the map."""
        layer, channel = self.layer, self.channel
        pattern = inside.reconstruct(self.network.model, self.x, layer, channel, self.method)
        caption = f"what map {channel} of {layer} responded to, by {inside.METHOD_NAMES[self.method]}"
        image = (255 * figures.pattern_image(pattern)).to(torch.uint8)
        large = client.tile(image, f"{caption}; {figures.largest(pattern)}", 270, 11)
        described = inside.describe_map(self.maps, layer, channel)
        small = client.tile(heat_map(self.maps[0, channel]), described, 130, 11)
        opts = dict(title="Map and pattern", width=RIGHT, height=305)
        self.page.text(large + small, win="Map and pattern", opts=opts)

    def _draw_activations(self):
        activations, channel = inside.mean_activations(self.maps).cpu(), self.channel
        mark = dict(x=channel, y=float(activations[channel]), text=f"map {channel}", showarrow=False)
        mark |= dict(font=dict(color="#b03a16"), yshift=9, bgcolor="white")
        options = dict(size=(GRID, 125), bargap=0, annotations=[mark], margin=dict(l=52, r=14, t=8, b=32))
        client.draw_bars(self.page, "Mean activations", activations, "mean", channel, **options)

    def _draw_responses(self):
        """The nine test images that the map responds to most, and its mean activation by class; or a note."""
        opts = dict(title=f"What map {self.channel} responds to most", width=RIGHT, height=365)
        if self.found is None:
            note = f"<div style='font-size:13px;padding:6px'>{html.escape(self.note)}</div>"
            return self.page.text(note, win="Nine", opts=opts)
        values, indices, positions, means = (tensor[self.channel] for tensor in self.found[self.layer])
        names, labels, width = self.network.classes, self.test_labels[indices], self.maps.shape[3]
        found = responses.crops(self.network, self.layer, width, self.test_images[indices], positions)
        images = [(255 * to_square(crop)).to(torch.uint8) for crop, _ in found]
        captions = [f"{html.escape(names[label])}, {value:.2f}" for label, value in zip(labels, values)]
        client.draw_images(self.page, "Nine", images, captions, 104, 10, **opts)
        by_class = [float(means[self.test_labels == label].mean()) for label in range(len(names))]
        trace = dict(type="bar", orientation="h", x=by_class, y=names)
        trace["hovertemplate"] = "%{y}: %{x:.4f}<extra></extra>"
        axis = dict(type="category", autorange="reversed", dtick=1, tickfont=dict(size=10), automargin=True)
        options = dict(size=(LEFT, 260), yaxis=axis, margin=dict(l=70, r=10, t=6, b=34))
        client.draw(self.page, "By class", [trace], "mean activation", **options)

    def _add_test_image(self, index):
        """Adds it to the images that one can choose; returns its name there."""
        name = f"test image {index}: {self.network.classes[self.test_labels[index]]}"
        self.images[name] = self.test_images[index]
        return name

    def prepare(self, args):
        """Adds the test images, where they are, and finds what each map responds to most; for a thread."""
        try:
            if self.network.photographs:
                self.say("Test images are shown here for networks that were trained on them, by train.py.")
            elif data.is_present(args.dataset, args.data):
                self.say("reading the test images …")
                dataset = data.load(args.dataset, args.data, self.network.classes, ["test"])
                with self.lock:
                    self.test_images, self.test_labels = dataset.test_images, dataset.test_labels
                    for index in range(min(LISTED, len(self.test_images))):
                        self._add_test_image(index)
                    self._draw_choices()
                network = self.network._replace(model=copy.deepcopy(self.network.model))  # hooks are its own
                found = responses.cached_strongest(network, dataset.test_images, batch=8, progress=self.track)
                with self.lock:
                    self.found = found
                    self._draw_responses()
            else:
                self.say(f"Where CIFAR-10 is, this shows test images. It is not in {args.data}.")
        except cli.UserError as error:
            self.say(f"No test images: {error}")
        except ConnectionError:  # the page has ended
            pass

    def say(self, note):
        """Writes the note where the nine images will be."""
        with self.lock:
            self.note = note
            self._draw_responses()

    def track(self, parts):
        """Yields the parts, tells on the page how many are done, and lets what must be answered go first."""
        told = 0
        for i, part in enumerate(parts):
            while self.lock.locked():
                time.sleep(0.02)
            if self.closing:
                raise ConnectionError
            if time.monotonic() - told > 2:
                told = time.monotonic()
                self.say(f"Looking at every test image, once: {i / len(parts):.0%} …")
            yield part


def heat_map(values):
    """[h, w] from 0 to the largest value as an image, uint8 [3, h, w] on the CPU; NaN is white."""
    values = values / values.nan_to_num().max().clamp(min=1e-12)
    colors = matplotlib.colormaps["inferno"].with_extremes(bad="white")
    return torch.from_numpy(colors(values.cpu().numpy(), bytes=True)[..., :3]).permute(2, 0, 1)


def to_square(image):
    """[3, h, w] with white below or right of it, where it is no square."""
    _, h, w = image.shape
    return F.pad(image, (0, max(h, w) - w, 0, max(h, w) - h), value=1.0)


def own_images(args, network):
    """What --image names, {name: uint8 [3, S, S] or a path}: files, folders, numbers of test images. Raises
    `UserError`."""
    found = {}
    for image in args.image:
        if Path(image).is_dir():
            files = sorted(file for file in Path(image).iterdir() if file.suffix.lower() in EXTENSIONS)
            if not files:
                raise cli.UserError(f"no images in the folder {image}: name another, or an image file")
            found |= {file.name if file.name not in found else str(file): file for file in files}
        elif image.isdecimal() and not data.is_present(args.dataset, args.data):
            raise cli.UserError(f"no test image {image} without CIFAR-10 in {args.data}: name an image file")
        else:
            pixels, name = data.select_image(image, args.dataset, args.data, network.classes, network.crop)
            found[name if name not in found else image] = pixels
    return found


def photographs():
    """{name: path} of scikit-image's photographs that show, or nearly, a class of CIFAR-10."""
    import skimage

    files = {name: Path(skimage.__file__).parent / "data" / file for name, file in PHOTOGRAPHS.items()}
    return {name: file for name, file in files.items() if file.is_file()}


def explore(args):
    """Opens the page and answers it until it is interrupted. Raises `UserError`."""
    port, network = args.port, network_from_flags(args)
    data.is_present(args.dataset, args.data)  # or an error
    images = own_images(args, network)
    if list(network.classes) != data.CLASSES["digits"]:
        images |= photographs()
    if not images:
        image, name = data.select_image("0", args.dataset, args.data, network.classes)
        images = {name: image}
    assets.ensure()
    server = None if client.is_listening(port) else client.start_server(port)
    try:
        while not client.is_listening(port):
            if server.poll() is not None:
                raise cli.UserError(f"no visdom server starts on port {port}: --port names another")
            time.sleep(0.2)
        with cli.stop_signals("closing the page …") as signals:
            page = client.connect(port, "explore", events=True)
            leave_note(page)  # what is seen when the server is started again without this
            front.draw(page)
            page.close(env="explore")
            explorer = Explorer(network, images, page)
            print(f"look inside: {client.address(port)}/env/explore (Ctrl-C ends it)", flush=True)
            background = threading.Thread(target=explorer.prepare, args=[args], daemon=True)
            background.start()
            while not signals:
                time.sleep(1)
                if not client.is_listening(port):
                    raise cli.UserError("the visdom server has ended, and the page with it: start this again")
            explorer.closing = True
            leave_note(page)
            background.join(timeout=10)
    except ConnectionError:
        raise cli.UserError(f"the visdom server on port {port} does not answer: --port names another")
    finally:
        client.stop_server(server)


def leave_note(page):
    """Leaves nothing on the page but how to open it again, and saves that."""
    page.close(env="explore")
    page.text(f"The explorer has ended. {TYPE} opens it again.", win="Ended", opts=dict(title="Explorer"))
    page.save(["explore"])
