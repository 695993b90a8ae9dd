"""A stand-in for Pyodide's files, and what a written page holds."""

import json
from hashlib import sha256
from html.parser import HTMLParser

from minilora.lab.site import CORE

VOID = {"meta", "link", "input", "br", "img"}


def wheel(package):
    """The file of a package in the stand-in."""
    return f"{package}-0-stand_in.whl"


WHEEL = wheel("numpy")


def stand_in(folder, core=CORE, packages=("numpy",), depends=()):
    """A folder that looks like Pyodide's, with a few bytes in each file; name -> bytes."""
    files = {name: f"the bytes of {name}".encode() for name in (*core, *map(wheel, packages))}
    about = {
        name: {"file_name": wheel(name), "sha256": sha256(files[wheel(name)]).hexdigest(), "depends": depends}
        for name in packages
    }
    files["pyodide-lock.json"] = json.dumps({"packages": about}).encode()
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


class Page(HTMLParser):
    """The elements of a page, (tag, attributes, depth), in order; AssertionError if they do not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def all(self, *tags):
        """The attributes of all elements of these kinds."""
        return [attributes for tag, attributes, _ in self.elements if tag in tags]

    @property
    def ids(self):
        return [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]
