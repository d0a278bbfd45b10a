"""Which images a backend has got."""

from camserve.gateway.pool.sent_images import MANY, SentImages
from camserve.types import Item, Target


def item(digest: bytes = b"name") -> Item:
    return Item(b"image", (Target(index=0),), (), digest=digest)


def test_an_image_travels_until_a_backend_is_known_to_have_it():
    sent = SentImages()
    assert sent.lightened("a", item()) == item()
    sent.note("a", [b"name"])
    light = sent.lightened("a", item())
    assert light.image is None
    assert (light.digest, light.targets) == (b"name", item().targets)
    assert sent.lightened("a", item(b"other")).image == b"image"
    assert sent.lightened("b", item()).image == b"image", "another backend has other workers"


def test_a_backend_that_was_forgotten_gets_everything_again():
    sent = SentImages()
    for backend in "ab":
        sent.note(backend, [b"name"])
    sent.forget("a")
    sent.forget("never heard of")
    assert sent.lightened("a", item()).image == b"image"
    assert sent.lightened("b", item()).image is None


def test_only_the_images_used_last_are_remembered():
    sent = SentImages()
    digests = [number.to_bytes(16) for number in range(MANY)]
    sent.note("a", digests)
    sent.note("a", [digests[0]])  # it is used again
    sent.note("a", [b"one more"])
    forgotten = [digest for digest in digests if sent.lightened("a", item(digest)).image is not None]
    assert forgotten == [digests[1]]
