import json


def write(folder, name, metrics):
    origin = {"command": f"python -m eval.run {name} --seed 3", "device": "a device", "date": "2026-01-02"}
    result = {"name": name, **origin, "metrics": metrics}
    (folder / f"{name}.json").write_text(json.dumps(result))


def interval(key, value, low, high):
    return {key: value, f"{key}.lo": low, f"{key}.hi": high}


def difference(key, value, low, high):
    return {f"{key}.mean": value, f"{key}.lo": low, f"{key}.hi": high}


def rows_of(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
