"""Writes tests/golden/text/*.json: token ids that the tokenizers in src/model/text are held against.

    python tests/reference/tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf

needs gguf, tokenizers, sentencepiece and transformers, and for the second opinion on SmolLM2's
ids xllamacpp, which ships a compiled llama.cpp. What is compared with what:

smollm2.json        The vocabulary of the GGUF file under the pipeline of SmolLM2's published
                    tokenizer.json (Digits(individual), then ByteLevel with GPT-2's words), run by the
                    Python tokenizers package. llama.cpp's own tokenizer, which shares no code with
                    it, tokenizes the same texts; where it differs its ids are recorded too.
byte_level/         A small byte-level BPE tokenizer.json (Llama 3's kind) with its ids.
sentencepiece/      A small SentencePiece BPE model with byte fallback, converted to tokenizer.json as
                    transformers converts Llama's; ids by the tokenizers package.
sentencepiece.json  The same vocabulary as GGUF stores it (pieces and scores); ids by SentencePiece.
sentencepiece_gemma.json  The same for Gemma's kind: no leading space, user-defined pieces.
"""

import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Regex, trainers
from transformers.convert_slow_tokenizer import generate_merges

from text_samples import PROSE, CODE, SYMBOLS, samples

GOLDEN = Path(__file__).parent.parent / "golden" / "text"


def write(name, value):
    path = GOLDEN / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value.pop("samples")
    head = json.dumps(value, ensure_ascii=False)[:-1]
    lines = ",\n".join(json.dumps(row, ensure_ascii=True, separators=(",", ":")) for row in rows)
    path.write_text(f'{head}{", " if value else ""}"samples":[\n{lines}\n]}}\n')
    print(f"{name}: {len(rows)} texts, {path.stat().st_size} bytes")


def llama_cpp_ids(path, texts):
    """Token ids by llama.cpp, or None without xllamacpp."""
    try:
        import xllamacpp
    except ImportError:
        return None
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    ids = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", data=body)
        request.add_header("Content-Type", "application/json")
        ids.append(json.load(urllib.request.urlopen(request))["tokens"])
    return ids


def smollm2(path):
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])

    texts = samples()
    rows = [{"text": text, "ids": tokenizer.encode(text).ids} for text in texts]
    for row in rows:
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["text"], row
    other = llama_cpp_ids(path, texts)
    for row, ids in zip(rows, other or []):
        if ids != row["ids"]:
            row["llama_cpp"] = ids
            print("llama.cpp differs:", ascii(row["text"]))
    write("smollm2.json", {"llama_cpp_compared": other is not None, "samples": rows})


def byte_level():
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE + CODE + SYMBOLS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    folder = GOLDEN / "byte_level"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    generation = {"eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    texts = samples()[::2] + ["<tool>call</tool> <|eot_id|>x", "a<|begin_of_text|>"]
    rows = [
        {
            "text": text,
            "ids": tokenizer.encode(text, add_special_tokens=True).ids,
            "decoded": tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True),
        }
        for text in texts
    ]
    write("byte_level/samples.json", {"samples": rows})


def train_sentencepiece(**options):
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "model")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PROSE[:26] + CODE),
            model_prefix=prefix,
            model_type="bpe",
            vocab_size=900,
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
            **options,
        )
        return sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")


def gguf_vocabulary(model):
    """Pieces, scores and types, as convert_hf_to_gguf.py writes them."""
    kinds = []
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    for i in range(model.vocab_size()):
        if model.is_unknown(i):
            kinds.append(2)
        elif model.is_control(i):
            kinds.append(3)
        elif model.is_byte(i):
            kinds.append(6)
        else:
            kinds.append(1)
    return pieces, [model.get_score(i) for i in range(model.vocab_size())], kinds


def plain(texts):
    """Without texts that hold special tokens, which SentencePiece never parses, or U+2581, which it
    cannot tell from a space, or NUL, which its Python interface ends a text at."""
    marks = ("<s>", "</s>", "<unk>", "<0x", "\u2581", "\0", "<start_of_turn>", "<tool")
    return [text for text in texts if not any(mark in text for mark in marks)]


def sentencepiece_llama():
    model = train_sentencepiece()
    pieces, scores, kinds = gguf_vocabulary(model)
    rows = [{"text": t, "ids": model.encode(t), "decoded": model.decode(model.encode(t))} for t in plain(samples())]
    vocabulary = {"tokens": pieces, "scores": scores, "token_types": kinds}
    write("sentencepiece.json", {**vocabulary, "samples": rows})

    # The same as a folder, converted like Llama's.
    vocab = {piece: i for i, piece in enumerate(pieces)}
    skip = [piece for piece, kind in zip(pieces, kinds) if kind != 1]
    merges = generate_merges(vocab, dict(zip(pieces, scores)), skip)
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = GOLDEN / "sentencepiece"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    texts = samples()[::2] + ["<s>a</s>b", "a <s> b"]
    bos = [vocab["<s>"]]
    rows = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        rows.append({"text": text, "ids": bos + ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    write("sentencepiece/samples.json", {"samples": rows})


def sentencepiece_gemma():
    user_defined = ["\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "<tool>"]
    model = train_sentencepiece(
        add_dummy_prefix=False,
        user_defined_symbols=user_defined,
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
    )
    pieces, scores, kinds = gguf_vocabulary(model)
    for i, piece in enumerate(pieces):
        if piece in user_defined:
            kinds[i] = 4
            # convert_hf_to_gguf.py: "pre-normalize user-defined spaces"
            pieces[i] = piece.replace("\u2581", " ")
    texts = plain(samples()) + ["a<tool>b", "  <tool>  ", "x    y  z", "a\n\n\n\n\nb"]
    rows = [{"text": t, "ids": model.encode(t), "decoded": model.decode(model.encode(t))} for t in texts]
    vocabulary = {"tokens": pieces, "scores": scores, "token_types": kinds}
    write("sentencepiece_gemma.json", {**vocabulary, "samples": rows})


if __name__ == "__main__":
    byte_level()
    sentencepiece_llama()
    sentencepiece_gemma()
    smollm2(Path(sys.argv[1]))
