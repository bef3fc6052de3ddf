"""A visdom page to look inside a network with: choose a layer, an image and a method, double-click a map."""

import contextlib
import copy
import html
import math
import random
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from common import cli, data, inside, responses
from common.images import read_image
from common.network import network_from_flags, weights_path
from common.page import assets, client, front
from common.page.choices import starting_images
from common.page.tiles import heat_map, pattern_tile, tile, to_square

# Pixels. Three columns of panes fill a window of 1280×800. A pane's height is a multiple of 15, less 10; what
# visdom is given for it is 15 less than that.
LEFT, GRID, RIGHT = 280, 530, 430  # widths; GRID is the side of the grid of maps, and the width of its column
PANE = 560  # the height of the pane with the grid
LISTED = 100  # test images to choose from by name, and mistakes among them; the others come at random


class Explorer:
    """The panes, drawn anew when something is chosen. `images` is {name: uint8 [3, S, S], or the path of an
    image file, which is read when it is chosen}; `load_test_images` adds those. `weights` is the path of the
    network. The lock is held while a choice or click is answered: what goes on in the background waits for
    it."""

    def __init__(self, network, images, page, weights=""):
        self.network, self.images, self.page, self.weights = network, images, page, Path(weights).resolve()
        self.layer, self.image, self.method = "conv5_x", next(iter(images)), "guided"
        self.test_images = self.test_labels = self.found = self.linked = None
        self.taken_for = {}  # what the network takes those images for that it gets wrong, once that is known
        self.note, self.lock, self.closing = "", threading.Lock(), False
        self.refresh()
        page.register_event_handler(self.on_link, "Choose")
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
            elif self.test_images is None:  # the button
                self.image = random.choice(list(self.images))
            else:
                self.image = self._add_test_image(random.randrange(len(self.test_images)))
            try:
                self.refresh()
            except cli.UserError as error:  # no image, though it is called one
                self.image = before
                self._draw_choices()
                self.page.text(html.escape(str(error)), win="Image", opts=dict(title="Image"))

    def on_link(self, event):
        """A mistake was clicked on the page of a run: the server tells."""
        if event["event_type"] != "Open":
            return
        with self.lock:
            if event["weights"] and Path(event["weights"]).resolve() != self.weights:
                text = f"That is a mistake of another network, not of {html.escape(str(self.weights))}. "
                text += f"To look at it, end this explorer and type<br>{event['command']}"
                return self.page.text(text, win="Image", opts=dict(title="Image"))
            self.linked = int(event["image"])
            self._open_linked()

    def _open_linked(self):
        """Opens the test image that a link has named, if the test images are there by now."""
        if self.linked is None or self.test_images is None or self.linked >= len(self.test_images):
            return
        self.image, self.linked, self.layer = self._add_test_image(self.linked), None, "conv5_x"
        self.refresh()

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
                self._draw_about_map()

    def refresh(self):
        """Draws everything, for the image and the layer that are chosen, and the strongest map there: in
        conv5_x the one that speaks most for what the network says. Raises `UserError` if the image cannot be
        read."""
        image = self.images[self.image]
        image = read_image(image, self.network.crop) if isinstance(image, Path) else image
        self.x = self.network.preprocess(image)
        with torch.no_grad():
            (self.maps,) = inside.feature_maps(self.network.model, self.x, self.layer)
        caption = f"{html.escape(self.image)};<br>{html.escape(self.network.prediction(self.x))}"
        self._draw_choices()  # visdom puts each pane into the first row that has room, so the order counts
        self._draw_grid()
        (self.channel,) = inside.choose_maps(self.maps, "strongest:1")
        self.decision = self._decide() if self.layer == "conv5_x" else None
        if self.decision:
            self.channel = int(self.decision[1].argmax())
        self._draw_pattern()
        client.draw_images(self.page, "Image", [image], [caption], 190, 11, width=LEFT, height=230)
        self._draw_about_map()

    def _decide(self):
        """(the class that the network says against another, in words; what each map of conv5_x adds to the
        difference of their logits [maps]). The other class is what the image is, or the next best."""
        model, classes, truth = self.network.model, self.network.classes, self.image.partition(": ")[2]
        parts = inside.contributions(model, inside.mean_activations(self.maps))
        logits = parts.sum(1) + model.fc.bias.detach()
        predicted = classes[logits.argmax()]
        names = [truth] if truth in classes and truth != predicted else []
        labels = inside.choose_classes(logits, classes, names)
        if len(labels) < 2:
            return None
        (a, b), (x, y) = labels, logits[labels].tolist()
        title = f"Why {classes[a]} and not {classes[b]}: what each map adds to the difference of their logits"
        title += f", {x - y:.2f}"
        return title, (parts[a] - parts[b]).cpu()

    def _draw_about_map(self):
        """Draws what else tells of the chosen map; the control last, since it takes the longest."""
        self._draw_activations()
        self._draw_responses()
        arguments = self.layer, self.channel, self.method
        control, correlation = inside.control(self.network.model, self.x, self.pattern, *arguments)
        self._draw_pattern(control, inside.describe_control(self.layer, correlation))

    def _draw_choices(self):
        self.choices = dict(layer=inside.STAGES, method=list(inside.RELU_BACKWARD), image=list(self.images))
        fields = []
        for attribute, values in self.choices.items():
            labels = [value + self.taken_for.get(value, "") for value in values]
            chosen = values.index(getattr(self, attribute))
            fields.append(dict(type="select", name=attribute, values=labels, value=chosen))
        # No field to type in: where a pane has an image, visdom swallows every key.
        fields.append(dict(type="button", name="or", value="a random image"))
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

    def _draw_pattern(self, control=None, verdict="Its control is being made …"):
        """The pattern that the map responded to and the map; where it is given, the control and what it says
        of the pattern."""
        layer, channel, row = self.layer, self.channel, self.maps[0, self.channel]
        if control is None:
            self.pattern = inside.reconstruct(self.network.model, self.x, layer, channel, self.method)
        caption = f"what map {channel} of {layer} responded to, by {inside.METHOD_NAMES[self.method]}"
        large = pattern_tile(self.pattern, caption, 265)
        described = inside.describe_map(self.maps, layer, channel)
        described += f", brightest at {row.max():.2f}" if row.any() else ""
        small = tile(heat_map(row), described, 118, 11)
        if control is not None:
            small += "<br>" + pattern_tile(control, "control", 118)
        content = f"{large}<div style='display:inline-block;vertical-align:top;width:140px'>{small}</div>"
        content += f"<div style='font-size:11px;line-height:1.1;margin:0 2px'>{verdict}</div>"
        opts = dict(title="Map and pattern", width=RIGHT, height=335)
        self.page.text(content, win="Map and pattern", opts=opts)

    def _draw_activations(self):
        """The maps' mean activations; for conv5_x, what they add to the decision."""
        title, label = "Mean activations", "mean"
        if self.decision:
            title, values = self.decision
            label, order = "adds", values.argsort(descending=True).tolist()
            named = [*order[:3], order[-1]]
        else:
            values, named = inside.mean_activations(self.maps).cpu(), []
        marks = [
            dict(x=n, y=float(values[n]), text=f"map {n}", showarrow=False, bgcolor="rgba(255,255,255,0.7)")
            | dict(font=dict(color="#b03a16" if n == self.channel else "#333", size=10))
            | dict(yshift=7 if values[n] >= 0 else -7)
            for n in dict.fromkeys([*named, self.channel])
        ]
        options = dict(size=(GRID, 125), bargap=0, annotations=marks, margin=dict(l=52, r=14, t=8, b=32))
        options["win"] = "Mean activations"
        client.draw_bars(self.page, title, values, label, self.channel, **options)

    def _draw_responses(self):
        """The nine test images that the map responds to most, and its mean activation by class; or a note."""
        opts = dict(title=f"What map {self.channel} responds to most", width=RIGHT, height=335)
        if self.found is None:
            note = f"<div style='font-size:13px;padding:6px'>{html.escape(self.note)}</div>"
            return self.page.text(note, win="Nine", opts=opts)
        values, indices, positions, means = (tensor[self.channel] for tensor in self.found[self.layer])
        names, labels, width = self.network.classes, self.test_labels[indices], self.maps.shape[3]
        found = responses.crops(self.network, self.layer, width, self.test_images[indices], positions)
        images = [(255 * to_square(crop)).to(torch.uint8) for crop, _ in found]
        captions = [f"{html.escape(names[label])}, {value:.2f}" for label, value in zip(labels, values)]
        client.draw_images(self.page, "Nine", images, captions, 88, 10, **opts)
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

    def _list_mistakes(self):
        """Puts the most confident mistakes first among the test images that one can choose. The means of
        conv5_x, which are known of all of them, are all that their logits depend on."""
        logits = inside.logits(self.network.model, self.found["conv5_x"][3])
        mistakes = inside.mistakes(self.test_labels, logits, self.network.classes)
        for index, _, predicted, _ in mistakes[:LISTED]:
            self.taken_for[self._add_test_image(index)] = f", taken for {predicted}"
        own = {name: image for name, image in self.images.items() if not name.startswith("test image ")}
        wrong = {name: self.images[name] for name in self.taken_for}
        self.images = own | wrong | self.images  # each name at its first place
        self._draw_choices()

    def load_test_images(self, args):
        """Adds the test images, where they are, and finds what each map responds to most; for a thread."""
        try:
            if self.network.photographs:
                note = "Test images are shown here for networks that were trained on them, by train.py."
                return self.say(note)
            if not data.is_present(args.dataset, args.data):
                note = f"There is no CIFAR-10 in {args.data}: with it, this pane would show test images."
                return self.say(note)
            self.say("reading the test images …")
            dataset = data.load(args.dataset, args.data, self.network.classes, ["test"])
            with self.lock:
                self.test_images, self.test_labels = dataset.test_images, dataset.test_labels
                for index in range(min(LISTED, len(self.test_images))):
                    self._add_test_image(index)
                self._draw_choices()
                self._open_linked()
            network = self.network._replace(model=copy.deepcopy(self.network.model))  # hooks are its own
            found = responses.cached_strongest(network, dataset.test_images, batch=8, progress=self.track)
            with self.lock:
                self.found = found
                self._list_mistakes()
                self._draw_responses()
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
        """Yields the parts, tells on the page how many are done, and waits while a choice or click is being
        answered. Raises `ConnectionError` when the explorer ends."""
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


def explore(args):
    """Opens the page and answers it until it is interrupted. Raises `UserError`."""
    port, network = args.port, network_from_flags(args)
    data.is_present(args.dataset, args.data)  # or an error
    images = starting_images(args, network)
    assets.ensure()
    server = None
    if not client.is_listening(port):
        cli.make_folder(client.PAGES, "start this in another folder")
        server = client.start_server(port)
    elif client.is_explorer_open(port):
        raise cli.UserError(f"an explorer is open on port {port}: end it, or choose another --port")
    try:
        while not client.is_listening(port):
            if server.poll() is not None:
                raise cli.UserError(f"no visdom server starts on port {port}: --port names another")
            time.sleep(0.2)
        with cli.stop_signals("closing the page ...") as signals:
            page = client.connect(port, "explore", events=True)
            forget(page)  # the panes of one that was killed
            explorer = Explorer(network, images, page, weights_path(args.weights, args.dataset))
            front.draw(page)
            print(f"look inside: {client.address(port)}/env/explore (Ctrl-C ends it)", flush=True)
            background = threading.Thread(target=explorer.load_test_images, args=[args], daemon=True)
            background.start()
            while not signals:
                time.sleep(1)
                if not client.is_listening(port):
                    raise cli.UserError("the visdom server has ended, and the page with it: start this again")
            explorer.closing = True
            background.join(timeout=10)
            command = f"python Myvisdom.py --explore{cli.port_flag(port)}"
            note = f"The explorer has ended. <code>{command}</code> opens it again."
            page.text(note, win="Choose", opts=dict(title="Choose", width=LEFT, height=155))
            forget(page)
            front.draw(page)
    except ConnectionError:
        raise cli.UserError(f"the visdom server on port {port} does not answer: --port names another")
    finally:
        client.stop_server(server)


def forget(page):
    """Removes the explorer's page from the server, but leaves its panes in a browser that shows them. Closing
    them would stop the page of visdom 0.3: it fails on a pane that is drawn just after others were closed."""
    with contextlib.suppress(ConnectionError):  # so visdom 0.2 answers where the page was never saved
        page.delete_env("explore")
