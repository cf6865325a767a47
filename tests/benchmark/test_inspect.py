"""The inspection page: its numbers against independent routes, its file as a browser would read it."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from einops import rearrange
from hostile_text import HOSTILE, count_as_text
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from jepa.benchmark.inspect import (
    AttentionRecorder,
    Subject,
    hardest,
    most_ambiguous,
    observe,
    one_per_label_in_turn,
    query_patches,
)
from jepa.benchmark.inspect_page import write_page
from jepa.data.transforms import EvalTransform
from jepa.encoders.pixels import PixelEncoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.evaluation.probe import confusion_counts, nearest
from jepa.evaluation.types import Features
from jepa.layers.attention import choose_attention
from jepa.reports.charts import MAX_LEGEND, mark_styles, scatter
from jepa.reports.page import principal_plane
from jepa.types import PatchGrid

VOID = {"meta", "img"}
SECTIONS = (
    "feature-maps", "attention", "nearest-neighbours", "embedding", "classes", "confusion-matrix", "hardest-pictures",
    "most-ambiguous-pictures",
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def readied(encoder, shape):
    """The encoder with a transform and fixed weights, large enough for uneven attention."""
    encoder.transform = EvalTransform(image_size=shape[2:], mean=[0.5] * shape[0], std=[0.25] * shape[0])
    with torch.no_grad():
        for number, weight in enumerate(encoder.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=seeded(number)) * 0.4)
    return encoder.eval()


def spatial(channels=3, frames=1):
    shape = (channels, frames, 16, 24)
    return readied(SpatialEncoder(clip_shape=shape, patch_size=8, embed_dim=24, depth=2, num_heads=2), shape)


def temporal(position="rope"):
    shape = (1, 4, 16, 16)
    encoder = TemporalEncoder(clip_shape=shape, patch_size=8, embed_dim=24, depth=2, num_heads=2, position=position)
    return readied(encoder, shape)


class Prefixed(nn.Module):
    """An encoder with tokens before the patches, which it does not return."""

    embed_dim = 24
    grid = PatchGrid(1, 2, 2)

    def __init__(self, class_token=True, **changes):
        super().__init__()
        self.model = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0, class_token=class_token,
            global_pool="token" if class_token else "avg", **changes,
        )  # fmt: skip
        self.num_prefix_tokens = self.model.num_prefix_tokens

    def grid_of(self, clips):
        return self.grid

    def forward(self, clips):
        return self.model.forward_features(clips[:, :, 0])[:, self.num_prefix_tokens :]


def pictures_of(encoder, num=3):
    shape = getattr(encoder, "clip_shape", (3, 1, 16, 16))
    return torch.randint(0, 256, (num, *shape), generator=seeded(1), dtype=torch.uint8)


def subject_of(encoder, *, num_classes=3, num=30, classes=None):
    """Random features and predictions."""

    def features(seed):
        return Features(torch.randn(num, 24, generator=seeded(seed)), torch.arange(num) % num_classes)

    def thumbnails(seed):
        size = (num, encoder.clip_shape[0], 8, 8)
        return torch.randint(0, 256, size, generator=seeded(seed), dtype=torch.uint8)

    return Subject(
        title="a <b> run", data="Shapes", encoder=encoder, train=features(2), test=features(3),
        pictures=pictures_of(encoder),
        train_thumbnails=thumbnails(4), test_thumbnails=thumbnails(5),
        classes=(classes or tuple(f"class <{n}>" for n in range(num_classes))),
        probabilities=torch.randn(num, num_classes, generator=seeded(6)).softmax(1), protocol=["features of <noise>"],
    )  # fmt: skip


class Reader(HTMLParser):
    """Collects open tags, and the text and pictures of each section."""

    def __init__(self):
        super().__init__()
        self.open, self.section, self.text, self.pictures, self.tags, self.links = [], "", {}, {}, set(), []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        if tag == "section":
            self.section = attributes["id"]
            self.text[self.section], self.pictures[self.section] = "", 0
        if tag in {"img", "image"} and self.section:
            self.pictures[self.section] += 1
        self.links += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.section:
            self.text[self.section] += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    subjects = {
        "images": subject_of(spatial()),
        "clips": subject_of(temporal()),
        "grey": subject_of(spatial(channels=1)),
        "many": subject_of(spatial(), num_classes=40, num=80),
    }
    return {name: write_page(tmp_path_factory.mktemp(name), subject) for name, subject in subjects.items()}


# The page


@pytest.mark.parametrize("name", ["images", "clips", "grey", "many"])
def test_page_is_one_balanced_file_with_every_section_that_asks_nobody_for_anything(pages, name):
    text, reader = pages[name].read_text(), read(pages[name])
    assert tuple(reader.text) == SECTIONS
    assert not re.search(r"https?://", text.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert not reader.tags & {"script", "link", "iframe"}
    assert all(link.startswith(("data:image/", "#")) for link in reader.links)
    assert {link[1:] for link in reader.links if link.startswith("#")} == set(SECTIONS)


def test_names_appear_as_they_are(pages):
    text = pages["images"].read_text()
    assert "a &lt;b&gt; run" in text
    assert "features of &lt;noise&gt;" in text
    assert "class <0>" in read(pages["images"]).text["nearest-neighbours"]


def test_no_name_of_a_class_or_a_fact_becomes_markup(tmp_path):
    classes = tuple(f"{HOSTILE}{n}" for n in range(3))
    subject = replace(subject_of(spatial(), classes=classes), title=HOSTILE, protocol=[HOSTILE])
    page = write_page(tmp_path, subject).read_text()
    assert count_as_text(page) > 100
    for title in SECTIONS:
        section = page.split(f'<section id="{title}">')[1].split("</section>")[0]
        assert count_as_text(section) >= 3, title


def test_clips_are_shown_as_strips_of_frames_over_maps(pages):
    looks = len(query_patches(temporal().grid))
    assert read(pages["clips"]).pictures["feature-maps"] == 3 * 2
    assert read(pages["clips"]).pictures["attention"] == 3 * (1 + 1 + looks)


def test_an_encoder_without_attention_is_shown_without(tmp_path):
    encoder = spatial()
    encoder.blocks = nn.ModuleList()
    reader = read(write_page(tmp_path, subject_of(encoder)))
    assert "there is no attention to read" in reader.text["attention"]
    assert reader.pictures["feature-maps"]


def test_pixels_which_have_no_parameters_are_shown_too(tmp_path):
    encoder = readied(PixelEncoder(clip_shape=(1, 1, 16, 16), patch_size=4), (1, 1, 16, 16))
    reader = read(write_page(tmp_path, subject_of(encoder)))
    assert "there is no attention to read" in reader.text["attention"]
    assert reader.pictures["feature-maps"]


def test_what_is_not_finite_is_left_out(tmp_path):
    encoder = spatial()
    encoder.norm.weight.data.fill_(torch.nan)
    subject = subject_of(encoder)
    subject.test.vectors[3, 4] = torch.nan
    text = read(write_page(tmp_path, subject)).text
    assert "not finite" in text["feature-maps"]
    assert "not finite" in text["embedding"]


# Attention


def block_io(encoder, clips):
    """The attention of the last block, its input and output, and the recorded call."""
    recorded = {}
    attn = (encoder.model if isinstance(encoder, Prefixed) else encoder).blocks[-1].attn
    hook = attn.register_forward_hook(lambda _, inputs, output: recorded.update(x=inputs[0], y=output))
    with torch.no_grad(), AttentionRecorder() as watch:
        encoder(clips)
    hook.remove()
    return attn, recorded["x"], recorded["y"], watch.call


@pytest.mark.parametrize("make", [spatial, temporal, lambda: temporal("vjepa2"), lambda: temporal("sincos")])
def test_shares_of_attention_sum_to_one_and_give_what_the_block_gives(make):
    encoder = make()
    attn, x, y, seen = block_io(encoder, encoder.transform(pictures_of(encoder)))
    value = rearrange(attn.qkv(x)[..., 2 * 24 :], "b s (h d) -> b h s d", h=2)
    per_head = [seen._replace(query=seen.query[:, [h]], key=seen.key[:, [h]]) for h in range(2)]
    shares = torch.stack([head.shares(torch.arange(x.shape[1])) for head in per_head], dim=1)  # [b, h, S, S]
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:3]))
    torch.testing.assert_close(attn.proj(rearrange(shares @ value, "b h s d -> b s (h d)")), y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.shares(torch.arange(x.shape[1])), shares.mean(1))


@pytest.mark.parametrize("masked", ["bool", "added"])
def test_shares_follow_the_mask_of_the_call(masked):
    query, key, value = torch.randn(3, 2, 4, 5, 6, generator=seeded()).unbind(0)
    sees = torch.rand(2, 1, 5, 5, generator=seeded(1)) > 0.4
    sees |= torch.eye(5, dtype=torch.bool)
    mask = sees if masked == "bool" else torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
    with AttentionRecorder() as watch:
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7)
    head = watch.call._replace(query=query[:, :1], key=key[:, :1])
    torch.testing.assert_close(head.shares(torch.arange(5)) @ value[:, 0], read[:, 0], atol=1e-6, rtol=1e-5)


def test_attention_received_sums_to_one_over_the_patches_that_see_each_other():
    for encoder in (spatial(), temporal()):
        received = observe(encoder, pictures_of(encoder)).attention.received
        torch.testing.assert_close(received.sum((1, 2, 3)), torch.ones(3))
    frames = spatial(frames=3)
    received = observe(frames, pictures_of(frames)).attention.received  # frames do not see each other
    torch.testing.assert_close(received.sum((2, 3)), torch.ones(3, 3))


def test_looks_and_received_are_rows_and_column_means_of_the_whole_attention():
    encoder = temporal()
    pictures = pictures_of(encoder)
    *_, seen = block_io(encoder, encoder.transform(pictures))
    whole, seen = seen.shares(torch.arange(encoder.grid.num_tokens)), observe(encoder, pictures)
    torch.testing.assert_close(seen.attention.received.flatten(1), whole.mean(1))
    torch.testing.assert_close(seen.attention.attention_of_queries.flatten(2), whole[:, list(seen.queries)])
    torch.testing.assert_close(seen.tokens, encoder(encoder.transform(pictures)).detach())


def test_a_frame_that_sees_itself_alone_is_looked_at_alone():
    encoder = spatial(frames=3)
    looks = observe(encoder, pictures_of(encoder)).attention.attention_of_queries  # [P, Q, 3, h, w]
    torch.testing.assert_close(looks[:, :, 1].sum((2, 3)), torch.ones(looks.shape[:2]))
    assert not looks[:, :, [0, 2]].any()


@pytest.mark.parametrize(("changes", "prefix"), [({}, 1), ({"reg_tokens": 2}, 3)])
def test_a_class_token_is_shown_and_no_patch_is_mistaken_for_it(changes, prefix):
    encoder = readied(Prefixed(**changes), (3, 1, 16, 16))
    pictures = pictures_of(encoder)
    *_, seen = block_io(encoder, encoder.transform(pictures))
    whole, attention = seen.shares(torch.arange(prefix + 4)), observe(encoder, pictures).attention
    torch.testing.assert_close(attention.class_token.flatten(1), whole[:, 0, prefix:])
    torch.testing.assert_close(attention.received.flatten(1), whole[:, prefix:, prefix:].mean(1))
    query = query_patches(encoder.grid)[0]
    torch.testing.assert_close(attention.attention_of_queries[:, 0].flatten(1), whole[:, prefix + query, prefix:])


def test_a_register_is_no_class_token():
    encoder = readied(Prefixed(class_token=False, reg_tokens=2), (3, 1, 16, 16))
    assert observe(encoder, pictures_of(encoder)).attention.class_token is None


def test_attention_is_read_whichever_kernel_the_encoder_was_trained_with():
    encoder = temporal()
    fused = observe(encoder, pictures_of(encoder)).attention
    choose_attention(encoder, torch.device("cpu"), torch.bfloat16)
    plain = observe(encoder, pictures_of(encoder)).attention
    torch.testing.assert_close(plain.attention_of_queries, fused.attention_of_queries)


def test_a_query_that_pools_the_tokens_is_not_taken_for_their_attention():
    class Pooled(SpatialEncoder):
        def forward(self, clips, keep=None):
            tokens = super().forward(clips, keep)
            return tokens + F.scaled_dot_product_attention(tokens[:, :1], tokens, tokens)

    made = Pooled(clip_shape=(3, 1, 16, 24), patch_size=8, embed_dim=24, depth=2, num_heads=2)
    pooled = readied(made, (3, 1, 16, 24))
    pictures = pictures_of(pooled)
    torch.testing.assert_close(
        observe(pooled, pictures).attention.received, observe(spatial(), pictures).attention.received
    )


def test_observing_leaves_the_modes_of_the_encoder():
    encoder = spatial().train()
    encoder.norm.eval()
    observe(encoder, pictures_of(encoder))
    assert encoder.training
    assert not encoder.norm.training


@pytest.mark.parametrize("grid", [PatchGrid(1, 1, 1), PatchGrid(1, 4, 4), PatchGrid(16, 3, 5), PatchGrid(2, 1, 2)])
def test_query_patches_are_different_tokens_of_one_time_step(grid):
    tokens = query_patches(grid)
    assert len(set(tokens)) == len(tokens)
    assert all(0 <= token < grid.num_tokens for token in tokens)
    assert len({token // (grid.h * grid.w) for token in tokens}) == 1


# Neighbours, plane, mistakes


def test_neighbours_equal_those_of_scikit_learn():
    queries, bank = torch.randn(300, 8, generator=seeded()), torch.randn(50, 8, generator=seeded(1))
    distance, expected = (
        NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(bank).kneighbors(queries)
    )
    indices, similarity = nearest(queries, bank, 5)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-5)
    assert nearest(queries, bank[:3], 5)[0].shape == (300, 3)


def test_the_page_has_the_share_of_neighbours_of_the_same_class(pages):
    subject = subject_of(spatial())
    bank = NearestNeighbors(n_neighbors=5, metric="cosine", algorithm="brute").fit(subject.train.vectors)
    neighbours = bank.kneighbors(subject.test.vectors, return_distance=False)
    share = (subject.train.labels.numpy()[neighbours] == subject.test.labels.numpy()[:, None]).mean()
    assert f"<dt>neighbours of the same class</dt><dd>{share:.1%}</dd>" in pages["images"].read_text()


def test_plane_equals_the_principal_components_of_scikit_learn_up_to_sign():
    vectors = torch.randn(200, 6, generator=seeded()).numpy() * [5, 3, 1, 1, 1, 1]
    plane, shares = principal_plane(vectors)
    reference = PCA(n_components=2).fit(vectors)
    expected = reference.transform(vectors)
    np.testing.assert_allclose(plane * np.sign((plane * expected).sum(0)), expected, atol=1e-6)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, atol=1e-6)


def test_hardest_are_the_wrong_ones_the_most_confident_first():
    probabilities = torch.randn(200, 4, generator=seeded()).softmax(1)
    labels = torch.randint(0, 4, (200,), generator=seeded(1))
    confidence, predicted = probabilities.max(1)
    wrong = [i for i in range(200) if predicted[i] != labels[i]]
    expected = sorted(wrong, key=lambda i: -float(confidence[i]))
    assert hardest(probabilities, labels, 7).tolist() == expected[:7]
    assert hardest(probabilities, labels, 1000).tolist() == expected


def test_most_ambiguous_are_those_with_the_smallest_lead():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.34, 0.33, 0.33], [0.05, 0.47, 0.48], [1.0, 0.0, 0.0]])
    assert most_ambiguous(probabilities, 3).tolist() == [1, 2, 0]


def test_confusion_equals_that_of_scikit_learn_and_leaves_out_what_has_no_label():
    labels, predicted = (
        torch.randint(-1, 5, (300,), generator=seeded()),
        torch.randint(0, 5, (300,), generator=seeded(1)),
    )
    known = labels >= 0
    expected = confusion_matrix(labels[known], predicted[known], labels=range(5))
    np.testing.assert_array_equal(confusion_counts(predicted, labels, 5), expected)


def test_shown_samples_are_of_all_classes_in_turn():
    assert one_per_label_in_turn(torch.tensor([1, 1, 1, 0, 2, 0]), 5) == [3, 0, 4, 5, 1]


def test_of_many_classes_the_most_frequent_are_coloured_and_the_legend_counts_the_others():
    labels = [str(n) for n in range(20) for _ in range(n + 1)]
    styles = mark_styles(labels)
    named = {name for name, style in styles.items() if style >= 0}
    assert named == {str(n) for n in range(20 - MAX_LEGEND + 1, 20)}
    drawn = scatter([(n, n % 7) for n in range(len(labels))], labels)
    assert f"{20 - MAX_LEGEND + 1} others" in drawn
    assert drawn.count('class="mark rest"') == 1 + sum(label not in named for label in labels)
