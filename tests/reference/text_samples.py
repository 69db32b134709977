"""The texts that tokenizers are held against each other on: many scripts, and what breaks tokenizers."""

PROSE = """
The quick brown fox jumps over the lazy dog.
It's what we've said: they're late, I'll wait, you'd know, I'm sure, don't ask.
IT'S WHAT WE'VE SAID: THEY'RE LATE, I'LL WAIT, YOU'D KNOW, I'M SURE.
"Quoted," she said — 'singly' and “doubly”… and so on.
e.g., i.e., etc.; vs. (see p. 12) [sic] {braces} <angles>
co-operate, re-enter, state-of-the-art, mother-in-law's
Supercalifragilisticexpialidocious antidisestablishmentarianism
The naïve café façade's coöperation über résumé.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.
Portez ce vieux whisky au juge blond qui fume.
Dès Noël où un zéphyr haï me vêt de glaçons würmiens je dîne d’exquis rôtis de bœuf.
El veloz murciélago hindú comía feliz cardillo y kiwi. ¿Qué tal? ¡Olé!
Luís argüia à Júlia que «brações, fé, chá, óxido, pôr, zângão» eram palavras do português.
Pchnąć w tę łódź jeża lub ośm skrzyń fig.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Árvíztűrő tükörfúrógép.
Flygande bäckasiner söka hwila på mjuka tuvor. Høj bly gom vandt fræk sexquiz på wc.
Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.
Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul ıssız.
Viņš ņēma žagaru ķīli; Įlinkdama fechtuotojo špaga sublykčiojusi pragręžė apvalų arbūzą.
Con sói nâu nhảy qua con chó lười. Tiếng Việt có dấu thanh: mạ mả mã má mà ma.
Съешь же ещё этих мягких французских булок, да выпей чаю.
Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п’яне знаємо.
Ах, чудна българска земьо, полюшвай цвртящи жита.
Љубазни фењерџија чађавог лица хоће да ми покаже штос.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Γειά σου Κόσμε!
Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος ἦν πρὸς τὸν θεόν.
Բոլոր մարդիկ ծնվում են ազատ ու հավասար։
ყველა ადამიანი იბადება თავისუფალი და თანასწორი.
敏捷的棕色狐狸跳过了懒狗。今天天气很好，我们去公园吧！
我爱北京天安门，天安门上太阳升。２０２４年１月１日。
天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。
いろはにほへと ちりぬるを わかよたれそ つねならむ
色は匂へど散りぬるを我が世誰ぞ常ならむ。カタカナ、ﾊﾝｶｸ、「引用」。
키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.
다람쥐 헌 쳇바퀴에 타고파. ㅋㅋㅋ ㅎㅎ
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق.
السَّلَامُ عَلَيْكُمْ، كَيْفَ الْحَالُ؟ ١٢٣٤٥
گچ پژ، سلام دنیا! نیم‌فاصله می‌خواهم. ۱۲۳۴
דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले। १२३४५
নমস্কার পৃথিবী, কেমন আছো? ১২৩
வணக்கம் உலகம்! தமிழ் எழுத்துக்கள். ௧௨௩
నమస్కారం ప్రపంచం. ಕನ್ನಡ ಲಿಪಿ. മലയാളം ലിപി.
સર્વને નમસ્કાર. ਸਤਿ ਸ੍ਰੀ ਅਕਾਲ.
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓
ສະບາຍດີ ພາສາລາວ. ជំរាបសួរ ភាសាខ្មែរ. မင်္ဂလာပါ
ሰላም ልዑል! የኢትዮጵያ ፊደል።
ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ ᏣᎳᎩ ᠮᠣᠩᠭᠣᠯ བོད་སྐད།
Лорем ipsum δolor сит 中文 混 mixed العربية και text हिन्दी テスト.
""".strip("\n").split("\n")

SYMBOLS = """
👍 👍🏽 👩‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 🇺🇸🇫🇷 ❤️ ☺︎ 1️⃣ #️⃣
🤦🏼‍♂️🤷🏿‍♀️ 🧑🏾‍🚀 👩🏻‍❤️‍💋‍👨🏿 🏴󠁧󠁢󠁥󠁮󠁧󠁿
text😀text😀😀 text😀
∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β)
∫₀^∞ e^{−x²} dx = √π⁄2 ≈ 0.886, ∑_{i=1}^n i² = n(n+1)(2n+1)/6
½ ⅓ ¼ ² ³ ¹ ₁₂₃ ⁴⁵ ① ② ㊿ Ⅳ ⅷ ㎏ ㍿
𝐇𝐞𝐥𝐥𝐨 𝓌𝑜𝓇𝓁𝒹 𝟘𝟙𝟚𝟛 𝕬𝕭𝕮 ｆｕｌｌｗｉｄｔｈ ＡＢＣ１２３
┌─┬┐ │ ││ ├─┼┤ └─┴┘ ░▒▓█ ▁▂▃▄▅▆▇█
← ↑ → ↓ ↔ ⇒ ⇔ ★ ☆ ♠ ♣ ♥ ♦ ☀ ☁ ☂ ✓ ✗ ✔️ ✖️
€100 £20 ¥3000 ₹500 ₽70 ¢5 ₿0.001 $1,234.56
© ® ™ § ¶ † ‡ • ‰ ′ ″ ‹ › « » ¿ ¡ ª º µ
a​b‌c‍d⁠e﻿f zero width
soft­hyphen non breaking narrow nbsp figure space
en space em　ideographic  hair thin
̈̈́ lone marks a̐éö̲ Z̸a̴l̵g̶o̷ ñ ñ é é Å Å Å
ﬁ ﬂ ﬀ ﬃ ǅ ǆ ß ẞ ſ ŉ İ ı
‮right to left override‬ ‏mark‎
ḍ̇ q̣̇ 각 각 가 가
""".strip("\n").split("\n")

CODE = """
def f(x: int) -> int:
    return x ** 2  # comment
\tif (a[i] != b[j] && !c) { return -1; }
for (let i = 0; i < 10; ++i) { console.log(`${i}: ${arr[i]?.name ?? 'none'}`); }
fn main() -> Result<(), Box<dyn Error>> { println!("{:?}", vec![1u8, 0xFF, 1_000]); Ok(()) }
#include <stdio.h>
int main(void) { printf("%d\\n", 42); return 0; }
SELECT a.*, COUNT(*) FROM t1 a LEFT JOIN t2 b ON a.id=b.id WHERE x LIKE '%y_%' GROUP BY 1;
<div class="a b" id='c'>&lt;text&gt; &amp; more</div><!-- comment -->
{"key": [1, 2.5, -3e-7, true, null], "nested": {"a": "b\\n\\u00e9"}}
https://user:pw@example.com:8080/a/b.html?q=1&r=%20x#frag mailto:a.b+c@d.org
C:\\\\Windows\\\\System32\\\\drivers ../../etc/passwd ~/.bashrc $HOME/${x}
git commit -m "fix: don't panic" && cargo build --release 2>&1 | tee out.log
^(?:[a-z0-9!#$%&'*+/=?^_`{|}~-]+)@((?:[a-z]+\\.)+[a-z]{2,})$
0x1F 0b1010 0o17 1e10 1.5E-3 .5 5. 1_000_000 12:34:56 2024-07-26T15:04:05Z
camelCase PascalCase snake_case SCREAMING_CASE kebab-case dotted.name
$$\\frac{a}{b} \\sum_{i=0}^{n} x_i^2$$ \\LaTeX{}
| a | b |
|---|:-:|
- [ ] todo **bold** _it_ `code` ~~strike~~ [link](url) ![img](src)
!!! ??? ... --- ___ *** ### $$$ %%% ^^^ &&& (( )) [[ ]] {{ }} << >> == != <= >= => -> :: ;; ,, ''' \\"\\"\\" ```
a=b a==b a===b a->b a=>b a::b a..b a...b a//b a/*b*/ a\\b a|b a||b
0 1 12 123 1234 12345 123456 1234567890 00 007 1,000,000 3.14159 -42 +7 1st 2nd x2 2x a1b2c3
1+1=2, 6*7=42; 10/3=3.333; 2^10=1024; 100% 50/50 #1 @2 &3
abc123def456 123abc456 ABC123 v1.2.3-rc.4+build.5
""".strip("\n").split("\n")

SPECIAL = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    "\r",
    "\t",
    "\t\t",
    " \n",
    "\n ",
    " \n \n ",
    "\t \t",
    "a ",
    " a",
    "  a",
    "   a  ",
    "a  b",
    "a   b",
    "a    b     c      d",
    "a\nb",
    "a\n\nb",
    "a\n\n\nb",
    "a \n b",
    "a\r\nb\r\nc\r\n",
    "line one\r\n\r\n  indented\r\n",
    "a\tb\t\tc",
    "    four\n        eight\n\ttab\n",
    "trailing   ",
    "trailing\n",
    "trailing \n\n ",
    "a\u000bb\u000cc\u001cd\u0085e\u2028f\u2029g",
    "\u00a0a\u00a0\u00a0b ",
    "\u3000\u3000全角　スペース",
    "\ufeffbyte order mark",
    "nul\u0000byte \u0001\u0002\u001b[31m\u007f",
    "\ufffd replacement \ufffd\ufffd",
    "\ue000 private use \uf8ff \U000f0000",
    "unassigned \u0378 \U000e0080 nonchar \ufffe\uffff",
    "\U0001f9ff\U00020000\U0002a6df\U00030000 astral",
    "a" * 100,
    "A" * 40 + "b" * 40,
    " " * 50,
    "\n" * 20,
    "=" * 80,
    "-" * 33 + ">" * 5,
    "ab" * 50,
    "1" * 50,
    "哈" * 20,
    "😂" * 15,
    "é" * 30,
    "e\u0301" * 20,
    "Ġ Ċ ĉ ▁ ▁▁a <0x0A> <0xE2><0x96><0x81>",
    "Ã© Ã¼ â\x80\x99 mojibake Ð¿Ñ\x80",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b",
    "a <|im_end|> b",
    " <|im_end|>",
    "<|im_end|> ",
    "<|im_end|><|im_end|>",
    "<|im_end|>\n\n<|im_end|>",
    "<|im_start|><|endoftext|><|im_end|>",
    "<|im_end",
    "|im_end|>",
    "<|im_end|",
    "<|IM_END|>",
    "< |im_end| >",
    "<|im_<|im_end|>end|>",
    "<repo_name>x/y<file_sep>src/main.rs\nfn main() {}",
    "<reponame> <filename> <gh_stars> <issue_start><issue_comment><issue_closed>",
    "<jupyter_start><jupyter_text>text<jupyter_code>code<jupyter_output>out<jupyter_script><empty_output>",
    "<s> </s> <unk> <pad> [INST] [/INST] <bos> <eos> <start_of_turn>user",
    "<|begin_of_text|><|eot_id|><|start_header_id|>",
    "12 345 6 7890",
    "1 2  3   4",
    " 1",
    "  1",
    "1 ",
    "a1 b2 c3",
    "x = 10;y=20",
    "٣٤٥ ๓๔ १२ ௧ ⅣⅤ ½¾ ²³ ①② 𝟙𝟚 １２",
    "1٢3४5",
    "3.14 3,14 3'14 3 14",
    "'s 't 're 've 'm 'll 'd 'S 'LL",
    " 's  's",
    "it''s it'' s'",
    "’s ’ll don’t",
    "a'b'c'd",
    "I'm'll've",
    "a_b __init__ _x x_",
    "a-b -a a- --a",
    "a.b .a a. ..a",
    "¡¿a?! (a) [b]{c}",
    "a!b@c#d$e%f^g&h*i(j)k",
    " !  ?   .",
    "!a ?b .c ,d",
    "a\u0300b\u0301c\u0302",
    "\u0300a",
    " \u0301",
    "क्षि त्र ज्ञ श्र",
    "ก็ กั่ กำ",
    "ﷺ ﷽ لا لا",
    "한국어 한국어",
    "が が ぱ ぱ",
    "\u200bzero\u200bwidth\u200b",
    "\u200d\u200c\u2060",
    "👩‍💻👩‍💻 👩 💻",
    "🇺🇸🇺 🇸",
    "❤ ❤️ ❤︎",
    "\ud7ff\uf900\ufb01\uff21",
]


def samples():
    """All texts: each line alone, then combinations that put one script or kind next to another."""
    lines = PROSE + SYMBOLS + CODE
    texts = SPECIAL + lines
    for i, line in enumerate(lines):
        other = lines[(i * 7 + 3) % len(lines)]
        texts.append(line[: len(line) // 2] + other[len(other) // 2 :])
        if i % 3 == 0:
            texts.append(line + "\n" + other + "\r\n\t" + line[:20])
    texts.append("\n".join(PROSE[:12]))
    texts.append("\n    ".join(CODE))
    return list(dict.fromkeys(texts))


if __name__ == "__main__":
    print(len(samples()), "texts,", sum(len(t.encode()) for t in samples()), "bytes")
