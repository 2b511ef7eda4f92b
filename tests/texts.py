"""Text fixtures: sentences in many scripts, a novel of random hanzi, and files of difficult encodings."""

import argparse
import codecs
import doctest
import inspect
import pydoc
import random
import textwrap
import typing
import unicodedata

ENGLISH = "It was a dark and stormy night;\nthe rain fell in torrents.\n" * 20
GERMAN = "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich schön größer.\n" * 20
END_OF_TEXT = "<|endoftext|>"
SENTENCES = {  # keys: language names of the project "Universal Declaration of Human Rights in Unicode"
    "eng": "The old fisherman mends his nets by the sea and tells the gulls what he saw when he was young.",
    "fra": "Dès l'été, le garçon naïf relit près de la fenêtre où l'âne brait : quel cœur, ce maître !",
    "deu_1901": "Die Wäscherin wußte, daß der Fluß im März höher stünde, und trug die Körbe über die Brücke.",
    "spa": "El niño pequeño subió a la montaña por la mañana; ¿qué buscaba allí? ¡Un pájaro azul, según él!",
    "por_PT": "A avó não esqueceu a canção que o capitão cantava às crianças no convés do navio.",
    "pol": "Gęś źle śpi, gdy ćma krąży nad łóżkiem, więc żółty księżyc świeci jej aż do świtu.",
    "ces": "Řehoř přišel pěšky až k příbřežní věži, kde žil starý kůň a četl mu noviny.",
    "tur": "Küçük çırağın ağabeyi İstanbul'da ışıklı bir dükkân açtı ve öğleden sonra şeker sattı.",
    "vie": "Người đánh cá kể chuyện cho lũ trẻ nghe bên bếp lửa, còn ngoài trời mưa rơi đều đều.",
    "rus": "Старый сторож зажёг фонарь у моста и долго слушал, как внизу шумит вода и кричат чайки.",
    "ukr": "Дівчина їхала до міста й тримала на колінах кошик, у якому спав ґречний їжак.",
    "ell_monotonic": "Ο γέρος ψαράς ξύπνησε νωρίς, έβαλε τα δίχτυα στη βάρκα και άκουσε τη θάλασσα.",
    "kat": "მოხუცი მებაღე ყოველ დილით რწყავდა ვარდებს და ჩიტებს ძველ სიმღერას უმღეროდა.",
    "hye": "Ծեր այգեպանը ամեն առավոտ ջրում էր վարդերը և երգում էր թռչունների համար։",
    "heb": "הזקן ישב ליד החלון וקרא ספר ישן על ים שאיש עוד לא חצה, ואחר כך נרדם.",
    "arb": "جلس البستاني تحت الشجرة وكتب رسالة إلى أخيه الذي سافر إلى مدينة بعيدة قبل عام.",
    "pes_1": "پدربزرگ چای ریخت و گفت که گربه‌ی همسایه باز روی دیوار باغ خوابیده است.",
    "hin": "बूढ़ा नाविक हर शाम नदी के किनारे बैठकर बच्चों को पुरानी कहानियाँ सुनाता था।",
    "ben": "বুড়ো মাঝি রোজ সন্ধ্যায় নদীর ধারে বসে ছোটদের পুরোনো গল্প শোনাত।",
    "tam": "பாட்டி காலையில் தோட்டத்தில் பூக்களைப் பறித்து, பேத்திக்கு ஒரு கதை சொன்னாள்.",
    "tha": "ชาวประมงเฒ่านั่งซ่อมแหอยู่ริมแม่น้ำ แล้วเล่านิทานให้หลานฟังทุกเย็น",
    "amh": "ሽማግሌው ገበሬ በየማለዳው ወደ ወንዙ ወርዶ ለልጆቹ ውሃ ያመጣ ነበር።",
    "jpn": "年老いた漁師は毎朝、浜辺で網をつくろいながら、カモメに昔の話を聞かせていた。",
    "kor": "늙은 어부는 아침마다 바닷가에서 그물을 고치며 갈매기에게 옛이야기를 들려주었다.",
    "cmn_hans": "老渔夫每天早上都坐在海边补他的网，一边补，一边给海鸥讲过去的事，那是他最大的快乐。",
    "cmn_hant": "老漁夫每天早上都坐在海邊補他的網，一邊補，一邊給海鷗講過去的事，那是他最大的快樂。",
}


def languages(length: int = 1500) -> dict[str, str]:
    """Return at least `length` characters per language: its sentence, then shuffles of its words."""
    found = {}
    for language, sentence in SENTENCES.items():
        draw = random.Random(language)
        blank = " " if sentence.count(" ") > 3 else ""
        parts = sentence.split(" ") if blank else list(sentence)
        lines = [sentence]
        while sum(map(len, lines)) < length:
            lines.append(blank.join(draw.sample(parts, len(parts))))
        found[language] = "\n".join(lines) + "\n"
    return found


def chinese_novel(length: int = 50_000) -> str:
    """Return random GB 2312 level-1 hanzi in sentences and lines; a fifth are the most common ones."""
    draw = random.Random(0)
    level = bytes(x for row in range(0xB0, 0xD8) for i in range(0xA1, 0xFF) for x in (row, i))
    hanzi = level.decode("gb2312", "ignore")  # the last five code points of level 1 are unassigned
    common = "的一是不了在人有这我他来大上个之也曰为以其而"
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        clause = draw.choices(common, k=2) + draw.choices(hanzi, k=draw.randint(2, 12))
        parts.append("".join(draw.sample(clause, len(clause))) + draw.choice("，，，。。？！：、；"))
        if draw.random() < 0.1:
            parts.append("\n　　")
    return "".join(parts)[: length - 1] + "完"


def web_pages(count: int) -> list[str]:
    """Return `count` different English-like documents of about 4,000 characters on average."""
    words = [word.strip(".;").lower() for word in (ENGLISH[:59] + SENTENCES["eng"]).split()]
    draw = random.Random(1)
    pages = []
    for _ in range(count):
        sentences = [
            " ".join(draw.choices(words, k=draw.randint(3, 20))) for _ in range(draw.randint(5, 140))
        ]
        pages.append("".join(s.capitalize() + draw.choice([". ", "! ", ".\n", ".\n\n"]) for s in sentences))
    return pages


def python_sources(length: int) -> str:
    """Return the first `length` characters of some modules of the standard library."""
    return "".join(map(inspect.getsource, (textwrap, argparse, inspect, doctest, pydoc, typing)))[:length]


def awkward() -> dict[str, bytes]:
    """Return files by name, each with content that text readers tend to get wrong."""
    accents = "".join(
        SENTENCES[language] + "\n" for language in ("vie", "fra", "ces", "ell_monotonic", "kor", "jpn")
    )
    newlines = "unix\nwindows\r\nold mac\rline\u2028paragraph\u2029next\x85vertical\x0bform\x0cend\n"
    blanks = (
        "\t\tif x:\n \u00a0\u2003a\u3000b\u200b\u200d\ufeffc \u202eabc\u202c\n\n\n\x1c\x1f  trailing   \n"
    )
    emoji = "👩‍👩‍👧‍👦 family, 👍🏽 thumb, 🇺🇳 flag, ❤️ heart, #️⃣ key, 🏴󠁧󠁢󠁳󠁣󠁴󠁿 tags, 𝔸 astral, 𠮷 rare\n"
    texts = {
        "bom_crlf.txt": "\ufeff" + ENGLISH.replace("\n", "\r\n"),
        "cr_only.txt": ENGLISH.replace("\n", "\r"),
        "mixed_newlines.txt": newlines * 20,
        "nul_and_control.txt": "text\0with\1some\x07control\x1b[31m characters\x7f\n" * 20,
        "nfc.txt": unicodedata.normalize("NFC", accents * 5),
        "nfd.txt": unicodedata.normalize("NFD", accents * 5),
        "emoji.txt": emoji * 20,
        "whitespace.txt": blanks * 20,
        "all_scripts.txt": "".join(f"== {language} ==\n{text}" for language, text in languages().items()),
        "many_characters.txt": "".join(filter(str.isprintable, map(chr, range(0xA0, 0xD800, 7)))) + "\n",
        "one_long_line.txt": " ".join(ENGLISH.split() * 100),
        "digits_and_punctuation.txt": "it's 3.14 -- 1,000½ (n't), ²³; 'll... [x]!!! 0xFF\n" * 20,
        "endoftext_literal.txt": f"A text that quotes {END_OF_TEXT}{END_OF_TEXT} and <|im_start|> as words.\n"
        * 20,
        "no_final_newline.txt": ENGLISH.rstrip(),
        "tiny_sentence.txt": "To be, or not.\n",
        "empty.txt": "",
        "single_char.txt": "a",
        "single_newline.txt": "\n",
        "one_repeated_char.txt": "a" * 20_000,
    }
    return {name: text.encode() for name, text in texts.items()} | {
        "utf16le_bom.txt": codecs.BOM_UTF16_LE + accents.encode("utf-16-le"),
        "latin1_german.txt": GERMAN.encode("latin-1"),
        "invalid_utf8.bin": b"good text before \xc3\x28\xff\xfe\x80 and after, \xed\xa0\x80 \xc0\xaf\n",
    }
