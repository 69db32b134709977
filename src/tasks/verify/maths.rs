//! Mathematical answers: the same number, fraction or expression.

use serde_json::{Map, Value};

use super::{Verdict, Verify, VerifyError, as_text, expression, present};
use crate::engine::answer::{extract, find, normalize};

/// Right is what says the same as the reference: the same text but for spelling, the same number, an
/// expression of the same value, or lists, intervals and matrices of such.
pub(super) struct Maths {
    reference: String,
}

impl Maths {
    /// `reference`, taken as it is; or the answer in `answer` (as GSM8K has it, behind `####`, or
    /// bare) or `solution` (as MATH has it, in `\boxed{}`).
    pub fn from_fields(fields: &Map<String, Value>) -> Result<Maths, String> {
        const WRONG: &str = "must be a text or a number";
        let text = |name: &str| match present(fields, name) {
            None => Ok(None),
            Some(value) => as_text(value).map(Some).ok_or(format!("`{name}` {WRONG}")),
        };
        let reference = match (text("reference")?, text("answer")?, text("solution")?) {
            (Some(reference), _, _) => Some(reference),
            (None, Some(answer), _) => {
                match answer.contains("####") || answer.contains("\\boxed") {
                    true => find(&answer),
                    false => Some(answer),
                }
            }
            (None, None, Some(solution)) => find(&solution),
            (None, None, None) => {
                return Err(
                    "it has no right answer: give `reference`, `answer` or `solution`".to_string(),
                );
            }
        };
        match reference.filter(|reference| !reference.trim().is_empty()) {
            Some(reference) => Ok(Maths { reference }),
            None => Err("the right answer is empty".to_string()),
        }
    }

    pub fn reference(&self) -> &str {
        &self.reference
    }
}

impl Verify for Maths {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
        let right = find(candidate).is_some_and(|answer| same(&answer, &self.reference));
        Ok(Verdict::new(right, extract(candidate)))
    }
}

/// Whether an answer says the same as the right one.
fn same(answer: &str, reference: &str) -> bool {
    let (answer, reference) = (bare(answer), bare(reference));
    if equal(&answer, &reference, 0) {
        return true;
    }
    // "x = 5" for 5, "18 dollars" for 18.
    if let (Some((_, value)), false) = (answer.rsplit_once('='), reference.contains('=')) {
        return equal(&bare(value), &reference, 0);
    }
    if let (Some((_, value)), false) = (reference.rsplit_once('='), answer.contains('=')) {
        return equal(&answer, &bare(value), 0);
    }
    is_number(&normalize(&reference))
        && only_number(&answer).is_some_and(|number| equal(number, &reference, 0))
}

/// Lists in lists.
const DEPTH: usize = 8;

fn equal(a: &str, b: &str, depth: usize) -> bool {
    let (a, b) = (a.trim(), b.trim());
    if a.is_empty() || b.is_empty() || depth == DEPTH {
        return a == b;
    }
    let (plain_a, plain_b) = (normalize(a), normalize(b));
    if is_number(&plain_a) && is_number(&plain_b) && !has_mixed_number(a) && !has_mixed_number(b) {
        // Exactly, whatever their size.
        return plain_a == plain_b;
    }
    let parts = [
        parts_of_matrix,
        parts_of_union,
        parts_in_brackets,
        parts_of_list,
    ];
    for split in parts {
        if let (Some(a), Some(b)) = (split(a), split(b)) {
            return a.equal(&b, depth + 1);
        }
    }
    // Ambiguous where normalised: "\frac{1}{2x}" and "\frac{1}{2}x" are one text then.
    let mean_the_same = || plain_a == plain_b && !(a.contains("\\frac") || b.contains("\\frac"));
    a == b || mean_the_same() || expression::equal(a, b)
}

/// An answer in parts.
struct Parts<'a> {
    /// What stands around them: equal lists have equal ones.
    frame: String,
    parts: Vec<&'a str>,
    /// Whether it is a set.
    any_order: bool,
}

impl Parts<'_> {
    fn equal(&self, other: &Parts, depth: usize) -> bool {
        if self.frame != other.frame || self.parts.len() != other.parts.len() {
            return false;
        }
        let mut pairs = self.parts.iter().zip(&other.parts);
        if pairs.all(|(a, b)| equal(a, b, depth)) {
            return true;
        }
        let mut left: Vec<&str> = other.parts.clone();
        self.any_order
            && self.parts.iter().all(|a| {
                let place = left.iter().position(|b| equal(a, b, depth));
                place.map(|place| left.swap_remove(place)).is_some()
            })
    }
}

/// `\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}`; the kind of brackets does not matter.
fn parts_of_matrix(text: &str) -> Option<Parts<'_>> {
    let inside = text.strip_prefix("\\begin{")?.strip_suffix("matrix}")?;
    let (_, inside) = inside.split_once("matrix}")?;
    let (inside, _) = inside.rsplit_once("\\end{")?;
    let rows: Vec<Vec<&str>> = inside
        .trim()
        .split('\n')
        .map(|row| row.split('&').collect())
        .collect();
    let shape: Vec<usize> = rows.iter().map(Vec::len).collect();
    Some(Parts {
        frame: format!("matrix {shape:?}"),
        parts: rows.concat(),
        any_order: false,
    })
}

/// Intervals joined by `\cup`.
fn parts_of_union(text: &str) -> Option<Parts<'_>> {
    let parts: Vec<&str> = text
        .split("\\cup")
        .flat_map(|part| part.split('∪'))
        .collect();
    (parts.len() > 1).then(|| Parts {
        frame: "union".to_string(),
        parts,
        any_order: true,
    })
}

/// `(1, 2)`, `[0, 1)`, `\{1, 2\}`.
fn parts_in_brackets(text: &str) -> Option<Parts<'_>> {
    let (open, inside) = ["(", "[", "\\{"]
        .into_iter()
        .find_map(|open| Some((open, text.strip_prefix(open)?)))?;
    let (close, inside) = [")", "]", "\\}"]
        .into_iter()
        .find_map(|close| Some((close, inside.strip_suffix(close)?)))?;
    let parts = at_commas(inside)?;
    let any_order = open == "\\{";
    (parts.len() > 1 || any_order).then(|| Parts {
        frame: format!("{open}{close}"),
        parts,
        any_order,
    })
}

/// Several answers: `1, 2`, `1 and 2`.
fn parts_of_list(text: &str) -> Option<Parts<'_>> {
    let parts = at_commas(text)?;
    let parts: Vec<&str> = parts
        .iter()
        .flat_map(|part| {
            part.split(" and ")
                .flat_map(|part| part.split("\\text{ and }"))
        })
        .map(|part| part.trim().trim_start_matches("and "))
        .filter(|part| !part.is_empty())
        .collect();
    (parts.len() > 1).then(|| Parts {
        frame: "list".to_string(),
        parts,
        any_order: true,
    })
}

/// Cuts at commas outside all brackets; `None` where brackets do not balance.
fn at_commas(text: &str) -> Option<Vec<&str>> {
    let (mut depth, mut begin) = (0i32, 0);
    let mut parts = Vec::new();
    for (place, character) in text.char_indices() {
        match character {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[begin..place]);
                begin = place + 1;
            }
            _ => {}
        }
        if depth < 0 {
            return None;
        }
    }
    parts.push(&text[begin..]);
    (depth == 0).then_some(parts)
}

/// Without what only sets type around an answer, without its units, and without "x ∈".
fn bare(answer: &str) -> String {
    let mut text = answer.trim().to_string();
    for (latex, plain) in [
        ("\n", " "),
        // The end of a matrix's row, before spaces are looked for.
        ("\\\\", "\n"),
        ("\\left", ""),
        ("\\right", ""),
        ("\\!", ""),
        ("\\,", " "),
        ("\\;", " "),
        ("\\ ", " "),
        ("~", " "),
        ("dfrac", "frac"),
        ("tfrac", "frac"),
        ("\\lbrace", "\\{"),
        ("\\rbrace", "\\}"),
        ("−", "-"),
    ] {
        if text.contains(latex) {
            text = text.replace(latex, plain);
        }
    }
    loop {
        let before = text.clone();
        text = strip_around(text.trim()).to_string();
        if let Some(unit) = without_unit(&text) {
            text = unit.to_string();
        }
        if text == before {
            break;
        }
    }
    if let Some((_, set)) = text.split_once("\\in ") {
        text = set.trim().to_string();
    }
    text
}

fn strip_around(text: &str) -> &str {
    let text = text.trim_end_matches(['.', ';', ':', ',']).trim();
    for (open, close) in [
        ("$$", "$$"),
        ("$", "$"),
        ("\\(", "\\)"),
        ("\\[", "\\]"),
        ("**", "**"),
        ("\\boxed{", "}"),
    ] {
        let inside = text.strip_prefix(open).and_then(|t| t.strip_suffix(close));
        if let Some(inside) = inside.filter(|inside| !inside.contains(open)) {
            return inside;
        }
    }
    // Prices.
    text.strip_prefix("\\$")
        .or_else(|| text.strip_prefix('$').filter(|rest| !rest.contains('$')))
        .unwrap_or(text)
}

/// `5 \text{ cm}^2` without the unit; nothing but a unit is an answer.
fn without_unit(text: &str) -> Option<&str> {
    let text = ["^2", "^3", "^{2}", "^{3}"]
        .into_iter()
        .find_map(|power| text.strip_suffix(power).filter(|rest| rest.ends_with('}')))
        .unwrap_or(text);
    ["\\text{", "\\mathrm{", "\\mbox{", "\\textrm{"]
        .into_iter()
        .find_map(|command| {
            let begin = text.rfind(command)?;
            let inside = text[begin + command.len()..].strip_suffix('}')?;
            let before = text[..begin].trim_end();
            // "6 \text{ and } 7" is no unit; nor is "\text{east}".
            let behind_a_value = before.ends_with(|c: char| c.is_ascii_digit() || "})".contains(c));
            (!inside.contains(['{', '}']) && behind_a_value).then_some(before)
        })
}

/// A normalised decimal number or fraction.
fn is_number(text: &str) -> bool {
    let digits =
        |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    match unsigned.split_once('/') {
        Some((above, below)) => digits(above) && digits(below),
        None => digits(unsigned),
    }
}

/// Whether digits stand in front of a fraction: `1\frac{1}{2}`, `1 1/2`.
fn has_mixed_number(text: &str) -> bool {
    let before_frac = text.find("\\frac").is_some_and(|place| {
        text[..place]
            .trim_end()
            .ends_with(|c: char| c.is_ascii_digit())
    });
    before_frac || text.contains('/') && text.trim().contains(' ')
}

/// The only number in a text.
fn only_number(text: &str) -> Option<&str> {
    let is_part = |c: char| c.is_ascii_digit() || ".,/".contains(c);
    let mut runs = text
        .split(|c: char| !is_part(c))
        .map(|run| run.trim_matches(['.', ',', '/']))
        .filter(|run| !run.is_empty());
    let number = runs.next()?;
    if runs.next().is_some() {
        return None;
    }
    let begin = text.find(number)?;
    // A name such as x2 or x_{2} holds no number.
    let before = text[..begin].trim_end_matches(['{', '(']);
    if before.ends_with(|c: char| c.is_alphanumeric() || "_^".contains(c)) {
        return None;
    }
    let negative = text[..begin].ends_with('-');
    Some(&text[begin - usize::from(negative)..begin + number.len()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn right(line: Value, candidate: &str) -> bool {
        let verifier = Maths::from_fields(line.as_object().unwrap()).unwrap();
        verifier.verify(candidate).unwrap().label == 1.0
    }

    /// A line of GSM8K.
    const DUCKS: &str = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = \
                         $<<9*2=18>>18 every day at the farmer’s market.\n#### 18";

    #[test]
    fn gsm8k() {
        let line = json!({"question": "Janet’s ducks lay …", "answer": DUCKS});
        for candidate in [
            "16 - 3 - 4 = 9 eggs, 9 * 2 = 18.\n#### 18",
            "She makes $18 every day.",
            "The answer is $18.",
            "The answer is 18 dollars.",
            "The answer is 18.00",
            "\\boxed{18}",
            "\\boxed{\\$18}",
            "\\boxed{18\\text{ dollars}}",
            "So she makes 9 × 2 = **18**",
            "#### $18.0",
        ] {
            assert!(right(line.clone(), candidate), "{candidate}");
        }
        for candidate in [
            "",
            "#### 9",
            "The answer is 18 or 19.",
            "18 eggs, so 20",
            "\\boxed{}",
            "#### 18 + 1",
            "-18",
            "The answer is 180",
            "1.8",
        ] {
            assert!(!right(line.clone(), candidate), "{candidate}");
        }
        assert!(right(json!({"answer": "#### 1,450"}), "The total is 1450"));
        assert!(right(json!({"answer": "#### 1450"}), "The total is 1,450."));
        assert!(right(json!({"answer": 7}), "it is 7"));
    }

    #[test]
    fn answers_of_math() {
        let mut wrong = Vec::new();
        let math = |answer: &str| json!({"problem": "…", "solution": format!("Thus $\\boxed{{{answer}}}$.")});
        for (reference, candidate) in [
            (r"\frac{1}{2}", r"\boxed{0.5}"),
            (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}"),
            (r"\frac{1}{2}", "The answer is 1/2."),
            (r"\frac12", r"\boxed{\frac{1}{2}}"),
            (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}"),
            (r"2\sqrt{13}", r"So it is $\boxed{\sqrt{52}}$."),
            (r"11\sqrt2", r"\boxed{11\sqrt{2}}"),
            (
                r"\left( 3, \frac{\pi}{2} \right)",
                r"\boxed{(3, \frac{\pi}{2})}",
            ),
            (
                r"\left( 3, \frac{\pi}{2} \right)",
                r"\boxed{\left(3,\dfrac{\pi}{2}\right)}",
            ),
            (
                r"(-\infty, 2) \cup (3, \infty)",
                r"\boxed{(3,\infty)\cup(-\infty,2)}",
            ),
            (r"[0,1)", r"\boxed{[0, 1)}"),
            (r"\{1, 2, 3\}", r"\boxed{\{3, 1, 2\}}"),
            ("1,-2", r"\boxed{-2, 1}"),
            ("x^3+3x-6", r"\boxed{-6 + 3x + x^{3}}"),
            ("p - q", r"\boxed{p-q}"),
            (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
            (r"\text{Evelyn}", r"The answer is Evelyn."),
            (r"\text{(C)}", r"\boxed{(C)}"),
            (r"90^\circ", r"\boxed{90}"),
            (r"5\text{ cm}", r"\boxed{5}"),
            (r"5", r"\boxed{5 \text{ cm}^2}"),
            ("10\\%", r"\boxed{10}"),
            (r"\$32,\!348", r"\boxed{32348}"),
            ("10,080", r"\boxed{10080}"),
            (
                r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
                r"\boxed{\begin{bmatrix}-1&0\\0&-1\end{bmatrix}}",
            ),
            (
                r"\begin{pmatrix} 1/2 \\ 0 \end{pmatrix}",
                r"\boxed{\begin{pmatrix} \frac{1}{2} \\ 0 \end{pmatrix}}",
            ),
            ("5", r"\boxed{x=5}"),
            ("x=5", r"\boxed{5}"),
            (r"1\frac{1}{2}", r"\boxed{\frac{3}{2}}"),
            (r"\frac{3}{2}", r"\boxed{1 \frac{1}{2}}"),
            ("1.5e3", r"\boxed{1500}"),
            (r"6.02 \times 10^{23}", r"\boxed{6.02\cdot 10^{23}}"),
            (r"x \in [-2,7]", r"\boxed{[-2,7]}"),
            ("52_8", r"\boxed{52_8}"),
            (r"\frac{1}{2x}", r"\boxed{\dfrac{1}{2x}}"),
        ] {
            if !right(math(reference), candidate) {
                wrong.push(format!("{reference} is {candidate}"));
            }
        }
        for (reference, candidate) in [
            (r"\frac{1}{2}", r"\boxed{0.51}"),
            (r"\frac{1}{3}", r"\boxed{0.33}"),
            (r"\frac{11}{2}", r"\boxed{1\frac{1}{2}}"),
            (r"\frac{1}{2}x", r"\boxed{\frac{1}{2x}}"),
            (r"(1,2)", r"\boxed{(2,1)}"),
            (r"(1,2)", r"\boxed{[1,2]}"),
            (r"(1,2)", r"\boxed{(1,2,3)}"),
            (r"\{1, 2, 2\}", r"\boxed{\{1, 1, 2\}}"),
            ("x+1", r"\boxed{y+1}"),
            (r"\text{east}", r"\boxed{\text{seat}}"),
            ("100000000000000000000", r"\boxed{100000000000000000001}"),
            (
                r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
                r"\boxed{\begin{pmatrix} 1 & 2 \end{pmatrix}}",
            ),
            (r"2\sqrt{13}", r"\boxed{7.21}"),
            ("0", r"\boxed{}"),
            ("12", r"\boxed{x_{12}}"),
        ] {
            if right(math(reference), candidate) {
                wrong.push(format!("{reference} is not {candidate}"));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn lines_without_a_right_answer_are_refused() {
        for (line, expected) in [
            (json!({"question": "q"}), "no right answer"),
            (
                json!({"answer": ["1"]}),
                "`answer` must be a text or a number",
            ),
            (json!({"answer": "  "}), "is empty"),
            (json!({"answer": "#### "}), ""),
        ] {
            let error = Maths::from_fields(line.as_object().unwrap()).err();
            if !expected.is_empty() {
                assert!(error.unwrap().contains(expected));
            }
        }
    }

    proptest! {
        #[test]
        fn any_candidate_is_read_without_a_panic(
            text in "\\PC{0,60}|\\\\boxed\\{[0-9,.()\\[\\]{}\\\\a-z &=]{0,30}\\}|(\\\\text\\{|\\\\begin\\{|matrix\\}|\\\\end\\{|,|1|\\}){0,12}",
            reference in "\\PC{1,20}",
        ) {
            let line = json!({"reference": format!("{reference}1")});
            right(line, &text);
        }

        /// Whatever is right stays right as the last thing in a longer text.
        #[test]
        fn integers_and_decimals(number in -1_000_000i64..1_000_000, cents in 0u8..100) {
            let reference = json!({"reference": format!("{number}.{cents:02}")});
            let said = format!("First 3, then 4, and so the answer is {number}.{cents:02}.");
            prop_assert!(right(reference.clone(), &said));
            let other = format!("\\boxed{{{number}.{:02}}}", (cents + 1) % 100);
            prop_assert!(!right(reference, &other));
        }
    }
}
