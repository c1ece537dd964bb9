from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import units
from cachefs.units import (
    Duration,
    LocalPath,
    Piece,
    Size,
    align_down,
    align_up,
    format_duration,
    format_size,
    is_power_of_two,
    parse_duration,
    parse_size,
    split_aligned,
)

ranges = st.tuples(st.integers(0, 1 << 63), st.integers(0, 1 << 63), st.integers(0, 40).map(lambda bits: 1 << bits))


class TestSize:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (512, 512),
            ("512", 512),
            ("0", 0),
            ("7B", 7),
            ("64KiB", 65536),
            ("3MiB", 3 << 20),
            ("50GiB", 50 << 30),
            ("1TiB", 1 << 40),
        ],
    )
    def test_is_whole_bytes_or_a_binary_unit(self, text: object, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("50GB", "50GiB"),
            ("50G", "50GiB"),
            ("50g", "50GiB"),
            ("50gib", "50GiB"),
            ("50 GiB", "50GiB"),
            ("64K", "64KiB"),
            ("0512", "512"),
            ("007 MiB", "7MiB"),
            ("5b", "5"),
        ],
    )
    def test_error_says_how_to_write_what_was_meant(self, text: str, meant: str) -> None:
        with pytest.raises(ValueError, match=rf"write {meant}$"):
            parse_size(text)

    @pytest.mark.parametrize(
        "value", [-1, "-1", 1.5, "1.5GiB", True, None, [], {}, "", "KiB", "٣", "9" * 5000, "9" * 50]
    )
    def test_anything_else_is_refused(self, value: object) -> None:
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(value)

    @given(st.integers(0, units.MAX_SIZE))
    def test_formatted_reads_back_as_itself(self, size: int) -> None:
        assert parse_size(format_size(size)) == size

    def test_is_formatted_in_the_largest_unit_that_divides_it(self) -> None:
        assert [format_size(size) for size in (0, 65536, 65537, 1 << 40, 3 << 29)] == [
            "0",
            "64KiB",
            "65537",
            "1TiB",
            "1536MiB",
        ]


class TestDuration:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("5s", 5.0),
            ("50us", 5e-5),
            ("100ms", 0.1),
            ("1.5s", 1.5),
            ("2min", 120.0),
            ("1h", 3600.0),
            (0, 0.0),
            ("0", 0.0),
            ("0s", 0.0),
        ],
    )
    def test_is_seconds(self, text: object, seconds: float) -> None:
        assert parse_duration(text) == seconds

    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            (5, "it with its unit, such as 5s or 5ms"),
            ("5m", "5min"),
            ("5 s", "5s"),
            ("50µs", "50us"),
            ("2 Hours", "2h"),
        ],
    )
    def test_error_says_how_to_write_what_was_meant(self, text: object, meant: str) -> None:
        with pytest.raises(ValueError, match=rf"write {meant}$"):
            parse_duration(text)

    @pytest.mark.parametrize("value", [-1, "-5s", True, False, None, [], "s", "5d", "1e3s", "05s", "9" * 30 + "h"])
    def test_anything_else_is_refused(self, value: object) -> None:
        with pytest.raises(ValueError, match="is not a duration"):
            parse_duration(value)

    @given(st.floats(1e-6, units.MAX_DURATION / 2))
    def test_formatted_reads_back_to_three_decimals(self, seconds: float) -> None:
        assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-3)

    def test_is_formatted_in_the_largest_unit_of_which_there_is_one(self) -> None:
        assert [format_duration(seconds) for seconds in (0, 5e-5, 0.1, 1.5, 120, 3600, 1e-12)] == [
            "0s",
            "50us",
            "100ms",
            "1.5s",
            "2min",
            "1h",
            "0s",
        ]


class Model(pydantic.BaseModel):
    size: Size = 0
    duration: Duration = 0.0
    path: LocalPath | None = None


class TestFields:
    def test_take_what_yaml_has(self) -> None:
        model = Model.model_validate({"size": "64KiB", "duration": "5ms", "path": "a/b"})
        assert (model.size, model.duration, model.path) == (65536, 0.005, Path("a/b"))

    def test_relative_path_begins_at_the_directory_of_the_context(self) -> None:
        context = {"directory": Path("/etc/disks")}
        assert Model.model_validate({"path": "../a"}, context=context).path == Path("/etc/disks/../a")
        assert Model.model_validate({"path": "/a"}, context=context).path == Path("/a")

    @pytest.mark.parametrize("value", ["", "a\0b", 5, [], True])
    def test_what_is_no_path_is_refused(self, value: object) -> None:
        with pytest.raises(pydantic.ValidationError, match="is not a path"):
            Model.model_validate({"path": value})

    @pytest.mark.slow
    @given(
        st.one_of(
            st.integers(-2, 1 << 64),
            st.booleans(),
            st.none(),
            st.from_regex(r"\A0?[0-9]{1,3}(\.[0-9])? ?(B|[KMGT]i?B?|us|ms|s|min|h|m)?\Z"),
        ),
        st.sampled_from(["size", "duration"]),
    )
    def test_schema_accepts_what_the_field_accepts(self, value: Any, field: str) -> None:
        validator = jsonschema.Draft202012Validator(Model.model_json_schema()["properties"][field])
        try:
            Model.model_validate({field: value})
        except pydantic.ValidationError:
            # the schema leaves the upper limit to us
            assert not validator.is_valid(value) or (isinstance(value, int) and value > units.MAX_SIZE)
        else:
            assert validator.is_valid(value)


class TestAlignment:
    def test_power_of_two(self) -> None:
        assert [value for value in range(-4, 20) if is_power_of_two(value)] == [1, 2, 4, 8, 16]

    @given(st.integers(0, 1 << 63), st.integers(1, 1 << 40))
    def test_align_finds_the_nearest_multiples(self, value: int, alignment: int) -> None:
        down, up = align_down(value, alignment), align_up(value, alignment)
        assert down % alignment == up % alignment == 0
        assert value - alignment < down <= value <= up < value + alignment


class TestSplitAligned:
    @pytest.mark.parametrize(
        ("request_range", "pieces"),
        [
            ((0, 8), [(0, 0), (0, 8), (8, 0)]),
            ((3, 2), [(3, 2), (5, 0), (5, 0)]),
            ((0, 3), [(0, 3), (3, 0), (3, 0)]),
            ((3, 5), [(3, 5), (8, 0), (8, 0)]),
            ((3, 6), [(3, 5), (8, 0), (8, 1)]),
            ((3, 15), [(3, 5), (8, 8), (16, 2)]),
            ((8, 12), [(8, 0), (8, 8), (16, 4)]),
            ((8, 0), [(8, 0), (8, 0), (8, 0)]),
            ((9, 0), [(9, 0), (9, 0), (9, 0)]),
        ],
    )
    def test_examples_with_blocks_of_8(self, request_range: tuple[int, int], pieces: list[tuple[int, int]]) -> None:
        assert list(split_aligned(*request_range, 8)) == pieces

    @given(ranges)
    def test_pieces_make_up_the_range_without_gaps(self, request_range: tuple[int, int, int]) -> None:
        offset, length, _ = request_range
        head, body, tail = split_aligned(*request_range)
        assert (head.offset, head.end, body.end, tail.end) == (offset, body.offset, tail.offset, offset + length)

    @given(ranges)
    def test_body_is_whole_blocks_and_the_rest_is_less_than_one(self, request_range: tuple[int, int, int]) -> None:
        _, _, alignment = request_range
        head, body, tail = split_aligned(*request_range)
        assert 0 <= head.length < alignment
        assert 0 <= tail.length < alignment
        assert body.length >= 0
        assert body.length % alignment == 0
        if body.length or tail.length:
            assert body.offset % alignment == tail.offset % alignment == 0
        if head.length:
            assert align_down(head.offset, alignment) == align_down(head.end - 1, alignment)

    @pytest.mark.parametrize("wrong", [(0, 1, 3), (0, 1, 0), (0, 1, -4), (-1, 1, 4), (0, -1, 4)])
    def test_refuses_what_is_no_range_or_no_power_of_two(self, wrong: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match="is no"):
            split_aligned(*wrong)

    def test_piece_knows_its_end(self) -> None:
        assert Piece(3, 5).end == 8
