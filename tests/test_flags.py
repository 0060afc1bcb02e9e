"""Flags that all commands read alike."""

import sys

import pytest

from data_prep import check, image_features, pack, rgbd, rooms

PLACES = ("--input=a", "--output=b")
COMMANDS = {
    check: ("a", "--up=z"),
    image_features: ("--input=a", "--encoder=b", "--height=1", "--width=1", "--name=c"),
    pack: (*PLACES, "--up=z"),
    rgbd: (*PLACES, "--seed=1"),
    rooms: (*PLACES, "--test=1"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_data_prep_takes_whole_names_once(command, monkeypatch, capsys):
    *others, flag = COMMANDS[command]
    name, value = flag.split("=")
    for given, told in (
        ([flag, flag], f"{name} is given twice"),
        ([f"{name[:-1]}={value}"], f"unrecognized arguments: {name[:-1]}={value}"),
    ):
        monkeypatch.setattr(sys, "argv", ["command", *others, *given])
        with pytest.raises(SystemExit) as left:
            command.main()
        assert left.value.code == 2
        assert told in capsys.readouterr().err
