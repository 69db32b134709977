//! The final answer in a candidate's text, in a form in which equal answers are equal strings: what
//! majority voting counts.
//!
//! This is not a verifier: it never sees the right answer, and two spellings that it does not know
//! to be equal merely split their votes.

/// The answer that a text ends in, normalised ([`normalize`]); `None` if the text says nothing.
///
/// The first of these that is there, the last one in the text if there are several:
/// 1. what stands in `\boxed{…}`;
/// 2. the rest of the line after `####`, as in GSM8K;
/// 3. the rest of the sentence after "answer is" or "answer:";
/// 4. a number;
/// 5. the last line with anything in it.
pub fn extract(text: &str) -> Option<String> {
    let text = &text.replace('−', "-");
    places(text)
        .map(normalize)
        .find(|answer| !answer.is_empty())
}

/// The same answer as it stands in the text, for who compares it with the right one.
pub fn find(text: &str) -> Option<String> {
    let text = &text.replace('−', "-");
    places(text)
        .find(|answer| !normalize(answer).is_empty())
        .map(|answer| answer.trim().to_string())
}

/// What stands where an answer is looked for, the surest place first.
fn places(text: &str) -> impl Iterator<Item = &str> {
    let places: [fn(&str) -> Option<&str>; 5] = [
        last_boxed,
        after_hashes,
        after_answer_is,
        last_number,
        last_line,
    ];
    places.into_iter().filter_map(move |find| find(text))
}

/// One spelling for answers that differ in case, whitespace, closing punctuation, markup around the
/// whole (`$…$`, `**…**`, quotes, `\text{…}`), LaTeX spacing, a dollar or percent sign, thousands
/// separators (1,234 = 1234), the notation of fractions (`\frac{1}{2}` = 1/2 = 2/4 = 0.5) and idle
/// zeros (3.0 = 3).
pub fn normalize(answer: &str) -> String {
    let answer = collapse_whitespace(&replace_latex(strip(answer)).to_lowercase());
    let answer = strip(&answer);
    let number = answer.strip_suffix('%').unwrap_or(answer).trim_end();
    canonical_number(number).unwrap_or_else(|| answer.to_string())
}

/// What stands in the last `\boxed{…}` whose braces balance.
fn last_boxed(text: &str) -> Option<&str> {
    text.rmatch_indices("\\boxed").find_map(|(start, command)| {
        let (inside, _) = braced(text[start + command.len()..].trim_start())?;
        Some(inside)
    })
}

fn after_hashes(text: &str) -> Option<&str> {
    let (_, rest) = text.rsplit_once("####")?;
    rest.lines().next()
}

fn after_answer_is(text: &str) -> Option<&str> {
    // Keeps the places of all characters.
    let lowercase = text.to_ascii_lowercase();
    let after_is = lowercase
        .rmatch_indices("answer is")
        .map(|(start, phrase)| start + phrase.len())
        // Not "answer isn't".
        .find(|&end| !lowercase[end..].starts_with(char::is_alphanumeric));
    let after_colon = lowercase
        .rfind("answer:")
        .map(|start| start + "answer:".len());
    let end = after_is.max(after_colon)?;
    let rest =
        text[end..].trim_start_matches(|c: char| c.is_whitespace() || matches!(c, ':' | '='));
    let rest = rest.lines().next()?;
    let sentence_end = rest.char_indices().find(|&(place, character)| {
        matches!(character, '.' | '!' | '?' | ';')
            && rest[place + 1..]
                .chars()
                .next()
                .is_none_or(char::is_whitespace)
    });
    Some(sentence_end.map_or(rest, |(place, _)| &rest[..place]))
}

/// The last number: digits, perhaps with a sign, thousands separators, decimals, or as a fraction
/// of two integers. Digits at the end of a word (`x2`) are none.
fn last_number(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let mut last = None;
    let mut place = 0;
    while place < bytes.len() {
        let starts = bytes[place].is_ascii_digit()
            || bytes[place] == b'.' && bytes.get(place + 1).is_some_and(u8::is_ascii_digit);
        if !starts {
            place += 1;
            continue;
        }
        let end = number_end(bytes, place);
        let before = text[..place].chars().next_back();
        if !before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            // A minus, unless it joins two things.
            let negative = before == Some('-')
                && !text[..place - 1].ends_with(|c: char| c.is_alphanumeric() || c == ')');
            last = Some(&text[place - usize::from(negative)..end]);
        }
        place = end;
    }
    last
}

/// End of the number that starts at `place`.
fn number_end(bytes: &[u8], place: usize) -> usize {
    let digits = |from: usize| {
        bytes[from..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count()
    };
    let digits_after = |at: usize, mark: u8| {
        let marked = bytes.get(at) == Some(&mark);
        if marked { digits(at + 1) } else { 0 }
    };
    let mut end = place + digits(place);
    if (1..=3).contains(&(end - place)) {
        while digits_after(end, b',') == 3 {
            end += 4;
        }
    }
    for mark in [b'.', b'/'] {
        let count = digits_after(end, mark);
        if count > 0 {
            end += 1 + count;
            break;
        }
    }
    end
}

fn last_line(text: &str) -> Option<&str> {
    text.lines().map(str::trim).rfind(|line| !line.is_empty())
}

/// If `text` begins with a brace that is closed: what stands inside, and what follows.
fn braced(text: &str) -> Option<(&str, &str)> {
    if !text.starts_with('{') {
        return None;
    }
    let mut depth = 0usize;
    let mut escaped = false;
    for (place, byte) in text.bytes().enumerate() {
        match byte {
            b'{' if !escaped => depth += 1,
            b'}' if !escaped => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((&text[1..place], &text[place + 1..]));
        }
        escaped = byte == b'\\' && !escaped;
    }
    None
}

/// Takes away markup around the whole, and closing punctuation.
fn strip(answer: &str) -> &str {
    const PAIRS: [(&str, &str); 12] = [
        ("$$", "$$"),
        ("$", "$"),
        ("**", "**"),
        ("*", "*"),
        ("`", "`"),
        ("\"", "\""),
        ("'", "'"),
        ("“", "”"),
        ("‘", "’"),
        ("\\(", "\\)"),
        ("\\[", "\\]"),
        ("{", "}"),
    ];
    const COMMANDS: [&str; 4] = ["\\text", "\\textbf", "\\mathrm", "\\mathbf"];
    let mut answer = answer.trim();
    loop {
        let before = answer.len();
        answer = answer.trim_end_matches(|c: char| c.is_whitespace() || ".,;:!?".contains(c));
        // An unfinished pair: "**42" of a text that broke off, "$18" of a price.
        answer = answer
            .trim_start_matches("**")
            .trim_end_matches("**")
            .trim();
        for (open, close) in PAIRS {
            let inside = answer
                .strip_prefix(open)
                .and_then(|rest| rest.strip_suffix(close));
            if let Some(inside) =
                inside.filter(|inside| !inside.contains(open) && !inside.contains(close))
            {
                answer = inside.trim();
            }
        }
        for command in COMMANDS {
            if let Some((inside, "")) = answer.strip_prefix(command).and_then(braced) {
                answer = inside.trim();
            }
        }
        let price = answer
            .strip_prefix("\\$")
            .or_else(|| answer.strip_prefix('$'));
        if let Some(price) = price.filter(|price| !price.contains('$')) {
            answer = price.trim();
        }
        if answer.len() == before {
            return answer;
        }
    }
}

/// Resolves the LaTeX that only sets type.
fn replace_latex(answer: &str) -> String {
    let mut answer = answer.to_string();
    for (latex, plain) in [
        ("{,}", ","),
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("\\!", ""),
        ("\\,", ""),
        ("\\;", ""),
        ("\\:", ""),
        ("\\ ", " "),
        ("~", " "),
        ("\\%", "%"),
        ("\\$", ""),
    ] {
        if answer.contains(latex) {
            answer = answer.replace(latex, plain);
        }
    }
    replace_fractions(&answer)
}

/// Writes `\frac{a}{b}` as a/b, in parentheses where they are more than a number or a name. Inner
/// fractions come first, because the last `\frac` holds no other.
fn replace_fractions(answer: &str) -> String {
    const FRACTION: &str = "\\frac";
    let mut answer = answer.to_string();
    let mut end = answer.len();
    while let Some(start) = answer[..end].rfind(FRACTION) {
        end = start;
        let parts = fraction_part(&answer[start + FRACTION.len()..]).and_then(|(above, rest)| {
            let (below, rest) = fraction_part(rest)?;
            Some(format!("{}/{}{rest}", grouped(above), grouped(below)))
        });
        if let Some(plain) = parts {
            answer.truncate(start);
            answer.push_str(&plain);
        }
    }
    answer
}

/// Numerator or denominator: `{…}`, or a single digit (`\frac12`).
fn fraction_part(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let digit = text.starts_with(|c: char| c.is_ascii_digit());
    braced(text).or_else(|| digit.then(|| text.split_at(1)))
}

fn grouped(part: &str) -> String {
    let part = part.trim();
    if part.chars().all(char::is_alphanumeric) {
        part.to_string()
    } else {
        format!("({part})")
    }
}

/// One space between words, none beside operators and brackets.
fn collapse_whitespace(answer: &str) -> String {
    const TIGHT: &str = "+-*/=^()[]{},<>|%";
    let mut collapsed = String::with_capacity(answer.len());
    for word in answer.split_whitespace() {
        let loose = !collapsed.is_empty()
            && !collapsed.ends_with(|c| TIGHT.contains(c))
            && !word.starts_with(|c| TIGHT.contains(c));
        if loose {
            collapsed.push(' ');
        }
        collapsed.push_str(word);
    }
    collapsed
}

/// The shortest decimal notation of a number or fraction of integers; the fraction in lowest terms
/// where there is none.
fn canonical_number(text: &str) -> Option<String> {
    match text.split_once('/') {
        Some((numerator, denominator)) => canonical_fraction(numerator, denominator),
        None => canonical_decimal(text),
    }
}

fn canonical_decimal(text: &str) -> Option<String> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let whole = without_separators(whole)?;
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if !all_digits(&whole) || !all_digits(fraction) || whole.len() + fraction.len() == 0 {
        return None;
    }
    let whole = whole.trim_start_matches('0');
    let fraction = fraction.trim_end_matches('0');
    Some(match (whole, fraction) {
        ("", "") => "0".to_string(),
        ("", fraction) => format!("{sign}0.{fraction}"),
        (whole, "") => format!("{sign}{whole}"),
        (whole, fraction) => format!("{sign}{whole}.{fraction}"),
    })
}

/// Takes the commas out of 1,234,567; `None` where they do not separate thousands.
fn without_separators(whole: &str) -> Option<String> {
    let mut groups = whole.split(',');
    let first = groups.next().unwrap_or_default();
    let rest: Vec<&str> = groups.collect();
    let separates = (1..=3).contains(&first.len()) && rest.iter().all(|group| group.len() == 3);
    (rest.is_empty() || separates).then(|| [first, &rest.concat()].concat())
}

fn canonical_fraction(numerator: &str, denominator: &str) -> Option<String> {
    let integer = |text: &str| -> Option<i128> {
        let text = text.trim();
        let inside = text
            .strip_prefix('(')
            .and_then(|rest| rest.strip_suffix(')'));
        canonical_decimal(inside.unwrap_or(text))?.parse().ok()
    };
    let (mut numerator, mut denominator) = (integer(numerator)?, integer(denominator)?);
    if denominator == 0 {
        return None;
    }
    let divisor = greatest_common_divisor(numerator.unsigned_abs(), denominator.unsigned_abs());
    let divisor = i128::try_from(divisor)
        .ok()?
        .checked_mul(denominator.signum())?;
    numerator = numerator.checked_div(divisor)?;
    denominator = denominator.checked_div(divisor)?;
    Some(
        terminating_decimal(numerator, denominator)
            .unwrap_or_else(|| format!("{numerator}/{denominator}")),
    )
}

/// The fraction as a decimal, if that ends (and fits); the denominator is positive.
fn terminating_decimal(numerator: i128, denominator: i128) -> Option<String> {
    let mut scale = 1i128;
    let mut decimals = 0;
    while scale % denominator != 0 {
        scale = scale.checked_mul(10)?;
        decimals += 1;
    }
    let digits = numerator.checked_mul(scale / denominator)?;
    let sign = if digits < 0 { "-" } else { "" };
    let digits = format!("{:0>width$}", digits.unsigned_abs(), width = decimals + 1);
    let (whole, fraction) = digits.split_at(digits.len() - decimals);
    canonical_decimal(&format!("{sign}{whole}.{fraction}"))
}

fn greatest_common_divisor(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_are_found_where_they_stand() {
        for (text, expected) in [
            // \boxed, before all else; the last whose braces balance.
            (r"We get \boxed{42}. The answer is 7.", "42"),
            (r"First \boxed{1}, then \boxed{2}", "2"),
            (r"so \boxed{\frac{3}{4}} #### 9", "0.75"),
            (r"so $\boxed{x^{2} + 1}$", "x^{2}+1"),
            (r"\boxed{\boxed{5}}", "5"),
            (r"\boxed{4} and then \boxed{4", "4"),
            (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
            (r"\boxed {8}", "8"),
            (r"\boxed{} it is 6", "6"),
            // GSM8K.
            ("She pays 3 * 6 = 18.\n#### 18", "18"),
            ("#### 5\n#### $1,234.50\nDone 7", "1234.5"),
            ("#### \nThe answer is 3", "3"),
            // A sentence.
            ("The answer is 12.", "12"),
            ("The final answer is: **Paris**.", "paris"),
            ("The answer is 3. No, the ANSWER IS 4! Or 5.", "4"),
            ("Answer: grandmother", "grandmother"),
            ("Question: 2 + 3? answer:5\n\nQuestion: 3", "5"),
            ("The answer is:\n\n$$ 25 $$", "25"),
            ("the answer is 3.14 metres", "3.14 metres"),
            ("The answer isn't 3 but 4", "4"),
            ("The answer is", "the answer is"),
            ("answer = 5", "5"),
            // The last number.
            ("2 + 2 = 4", "4"),
            ("It costs $1,234,567.", "1234567"),
            ("from 10 to -3 degrees", "-3"),
            ("10-3", "3"),
            ("half, i.e. 2/4 of it", "0.5"),
            ("half, i.e. .50 of it", "0.5"),
            ("we choose x2", "we choose x2"),
            ("pages 1,23", "23"),
            ("3 × 4 equals −12", "-12"),
            ("it is 7.", "7"),
            // The last line.
            (
                "Let me think.\n\n  The Mother-in-law.  \n\n",
                "the mother-in-law",
            ),
            ("日本。", "日本。"),
        ] {
            assert_eq!(extract(text).as_deref(), Some(expected), "{text:?}");
        }
        for nothing in ["", "  \n\t\n", "\\boxed{}", "**", "..."] {
            let found = extract(nothing);
            assert!(
                found.is_none() || nothing == "\\boxed{}",
                "{nothing:?}: {found:?}"
            );
        }
    }

    #[test]
    fn equal_answers_become_equal() {
        for spellings in [
            &[
                "3", "3.0", "3.", " 3 ", "+3", "03", "$3$", "\\$3", "$3.00", "**3**", "6/2", "3%",
                "3\\%",
            ][..],
            &[
                "1/2",
                "\\frac{1}{2}",
                "\\dfrac12",
                "\\frac{ 2 }{4}",
                "0.5",
                ".5",
                "0.50",
                "(1)/(2)",
                "-1/-2",
                "1 / 2",
            ],
            &["-1/3", "-\\frac{1}{3}", "\\frac{-1}{3}", "1/-3", "-2/6"],
            &[
                "1234567",
                "1,234,567",
                "1{,}234{,}567",
                "1\\,234\\,567",
                "1,234,567.0",
            ],
            &["0", "-0", "0.0", "0/5", "00"],
            &[
                "paris",
                "Paris.",
                " PARIS!",
                "\"Paris\"",
                "\\text{Paris}",
                "`paris`",
                "“Paris”",
                "**Paris.**",
            ],
            &["(3,4)", "( 3, 4 )", "\\left(3, 4\\right)", "$(3,4)$"],
            &["new york", "New  York", "New\nYork"],
            &["(x+1)/2", "\\frac{x + 1}{2}", "\\tfrac{x+1}{2}"],
            &["1/(1/x)", "\\frac{1}{\\frac{1}{x}}"],
        ] {
            for spelling in spellings {
                assert_eq!(normalize(spelling), normalize(spellings[0]), "{spelling:?}");
            }
        }
        assert_eq!(normalize("3.0"), "3");
        assert_eq!(normalize("\\frac{1}{3}"), "1/3");
        assert_eq!(normalize("\\frac{x + 1}{2}"), "(x+1)/2");
    }

    #[test]
    fn different_answers_stay_different() {
        for (one, other) in [
            ("3", "-3"),
            ("1/2", "2"),
            ("0.3333", "1/3"),
            ("1,23", "123"),
            ("12,3456", "123456"),
            ("(1,2)", "(2,1)"),
            ("x+1", "x-1"),
            ("10", "1"),
            ("1/0", "0"),
            ("$3$ or $4$", "3 or 4"),
        ] {
            assert_ne!(normalize(one), normalize(other), "{one:?} {other:?}");
        }
    }

    #[test]
    fn huge_numbers_are_not_cut() {
        let digits = "9".repeat(100);
        assert_eq!(normalize(&format!("0{digits}.0")), digits);
        assert_eq!(normalize(&format!("{digits}/3")), format!("{digits}/3"));
        assert_eq!(
            normalize("1/170141183460469231731687303715884105727"),
            "1/170141183460469231731687303715884105727"
        );
        // i128::MIN has no positive twin.
        assert_eq!(
            normalize(
                "-170141183460469231731687303715884105728/-170141183460469231731687303715884105728"
            ),
            "-170141183460469231731687303715884105728/-170141183460469231731687303715884105728"
        );
    }

    proptest! {
        #[test]
        fn any_text_has_an_answer_or_none(text in r"([\\{}$*.,/0-9 a#\n−é-]|\\boxed|\\frac|answer is){0,30}") {
            if let Some(answer) = extract(&text) {
                prop_assert!(!answer.is_empty());
            }
        }

        #[test]
        fn numbers_survive_their_notation(value in -1_000_000i64..1_000_000, zeros in 0usize..3) {
            let plain = value.to_string();
            let decimal = if zeros > 0 { format!("{value}.{}", "0".repeat(zeros)) } else { plain.clone() };
            prop_assert_eq!(normalize(&decimal), plain.clone());
            prop_assert_eq!(normalize(&format!("{}/7", value * 7)), plain.clone());
            prop_assert_eq!(extract(&format!("so we get {decimal}.")), Some(plain));
        }

        #[test]
        fn decimals_and_fractions_agree(thousandths in -100_000i64..100_000) {
            let sign = if thousandths < 0 { "-" } else { "" };
            let size = thousandths.abs();
            let decimal = format!("{sign}{}.{:03}", size / 1000, size % 1000);
            prop_assert_eq!(normalize(&decimal), normalize(&format!("{thousandths}/1000")));
        }
    }
}
