//! Multiple choice: which letter?

use serde_json::{Map, Value};

use super::{Verdict, Verify, VerifyError, as_text, present};

/// Letters that are looked for where a line does not say how many choices there are.
const UNKNOWN_CHOICES: usize = 5;
const MOST_CHOICES: usize = 26;

/// Right is the letter of the right choice, wherever the candidate says it, or the choice's own text.
#[derive(Debug)]
pub(super) struct Choice {
    right: char,
    /// How many letters there are, from A.
    count: usize,
    /// The choices' texts in lower case; none where they are not known.
    texts: Vec<String>,
}

impl Choice {
    /// The right one is `reference`, `answer`, `answerKey` or `label`: a letter, a number from 0, or
    /// the text of a choice. `choices` (texts, or as in ARC `{"text": [..], "label": [..]}` or
    /// `[{"text", "label"}]`), `options` or `endings` are the choices.
    pub fn from_fields(fields: &Map<String, Value>) -> Result<Choice, String> {
        let (texts, labels) = choices(fields)?;
        if texts.len() > MOST_CHOICES {
            return Err(format!(
                "it has {} choices: {MOST_CHOICES} are the most",
                texts.len()
            ));
        }
        let value = ["reference", "answer", "answerKey", "label", "gold"]
            .into_iter()
            .find_map(|name| present(fields, name))
            .ok_or("it has no right answer: give `reference`, a letter")?;
        let count = if texts.is_empty() {
            UNKNOWN_CHOICES
        } else {
            texts.len()
        };
        let texts: Vec<String> = texts.iter().map(|text| fold(text)).collect();
        let index = right_choice(value, &texts, &labels).filter(|&index| {
            index
                < if texts.is_empty() {
                    MOST_CHOICES
                } else {
                    count
                }
        });
        let index = index.ok_or_else(|| {
            format!("the right answer {value} is none of its {count} choices: give a letter")
        })?;
        Ok(Choice {
            right: letter(index),
            count: count.max(index + 1),
            texts,
        })
    }

    /// The letter of the right choice.
    pub fn letter(&self) -> char {
        self.right
    }

    /// The choice that a text makes.
    ///
    /// The first of these that is there: the last `\boxed{…}` that holds a letter; what stands behind
    /// the last "answer is", "answer:" or "####"; a letter that the text begins with; the last letter
    /// in parentheses; the text of a choice, as the whole answer or the only one that is mentioned; the
    /// last capital letter that stands alone and is no word.
    fn choice_of(&self, text: &str) -> Option<char> {
        let boxed = text
            .rmatch_indices("\\boxed{")
            .find_map(|(place, command)| self.leading(&text[place + command.len()..]));
        boxed
            .or_else(|| self.behind_answer(text))
            .or_else(|| self.leading(text))
            .or_else(|| self.in_parentheses(text))
            .or_else(|| self.by_text(text))
            .or_else(|| self.standing_alone(text))
    }

    fn letter_of(&self, character: char) -> Option<char> {
        let letter = character.to_ascii_uppercase();
        letter
            .is_ascii_uppercase()
            .then_some(letter)
            .filter(|letter| usize::from(*letter as u8 - b'A') < self.count)
    }

    /// A letter at the start, perhaps in brackets or behind markup, that is not the start of a word.
    /// Of small letters and the article "A" only those that a mark closes.
    fn leading(&self, text: &str) -> Option<char> {
        let opened = text.trim_start_matches(|c: char| c.is_whitespace() || "*_`$".contains(c));
        let opened = [
            "\\text{",
            "\\textbf{",
            "\\mathrm{",
            "option ",
            "Option ",
            "choice ",
            "Choice ",
        ]
        .into_iter()
        .find_map(|prefix| opened.strip_prefix(prefix))
        .unwrap_or(opened);
        let opened = opened.trim_start_matches(['(', '[', '*', '"', '\'']);
        let mut characters = opened.chars();
        let first = characters.next()?;
        let letter = self.letter_of(first)?;
        let rest = characters.as_str();
        let next = rest.chars().next();
        let closed = next.is_none_or(|c| ".),:]}*`\"'\n$".contains(c));
        let spaced = next == Some(' ') && first.is_ascii_uppercase();
        let article = first == 'A' && rest.trim_start().starts_with(|c: char| c.is_lowercase());
        (closed || spaced && !article).then_some(letter)
    }

    fn behind_answer(&self, text: &str) -> Option<char> {
        let lowercase = text.to_ascii_lowercase();
        let mut places: Vec<usize> = ["answer is", "answer:", "####", "answer choice is"]
            .into_iter()
            .flat_map(|phrase| {
                let ends = lowercase.match_indices(phrase);
                ends.map(move |(place, _)| place + phrase.len())
            })
            .collect();
        places.sort_unstable();
        let behind = |&end: &usize| {
            let rest = text[end..].trim_start_matches([' ', ':', '\n', '*']);
            self.leading(rest)
                .or_else(|| self.by_text(rest.lines().next()?))
        };
        places.iter().rev().find_map(behind)
    }

    fn in_parentheses(&self, text: &str) -> Option<char> {
        text.rmatch_indices('(').find_map(|(place, _)| {
            let mut inside = text[place + 1..].chars();
            let letter = self.letter_of(inside.next()?)?;
            (inside.next() == Some(')')).then_some(letter)
        })
    }

    fn by_text(&self, text: &str) -> Option<char> {
        let said = fold(text);
        let whole = self.texts.iter().position(|choice| *choice == said);
        let mentioned = || {
            // Of choices that hold each other ("6" and "16") words decide, not letters.
            let holds = |choice: &str| {
                !choice.is_empty()
                    && said.match_indices(choice).any(|(place, _)| {
                        let before = said[..place].chars().next_back();
                        let after = said[place + choice.len()..].chars().next();
                        let in_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
                        !in_word(before) && !in_word(after)
                    })
            };
            let mut places = (0..self.texts.len()).filter(|&index| holds(&self.texts[index]));
            places.next().filter(|_| places.next().is_none())
        };
        whole.or_else(mentioned).map(letter)
    }

    fn standing_alone(&self, text: &str) -> Option<char> {
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '\'');
        let letters = words.filter(|word| word.len() == 1 && *word != "A" && *word != "I");
        let capital =
            letters.filter_map(|word| word.chars().next().filter(char::is_ascii_uppercase));
        capital.filter_map(|word| self.letter_of(word)).next_back()
    }
}

impl Verify for Choice {
    fn verify(&self, candidate: &str) -> Result<Verdict, VerifyError> {
        let chosen = self.choice_of(candidate);
        Ok(Verdict::new(
            chosen == Some(self.right),
            chosen.map(String::from),
        ))
    }
}

/// Case, space around it and a closing full stop are not what tells choices apart.
fn fold(text: &str) -> String {
    let words: Vec<&str> = text
        .trim()
        .trim_end_matches('.')
        .split_whitespace()
        .collect();
    words.join(" ").to_lowercase()
}

fn letter(index: usize) -> char {
    char::from(b'A' + index as u8)
}

/// The choices' texts, and their labels where they have their own.
fn choices(fields: &Map<String, Value>) -> Result<(Vec<String>, Vec<String>), String> {
    const WRONG: &str = "`choices` must be a list of texts";
    let found = ["choices", "options", "endings"]
        .into_iter()
        .find_map(|name| present(fields, name))
        // ARC's first form has them in the question.
        .or_else(|| {
            fields
                .get("question")
                .and_then(|question| question.get("choices"))
        });
    let texts = |values: &Value| -> Result<Vec<String>, String> {
        let values = values.as_array().ok_or(WRONG)?;
        let texts: Option<Vec<String>> = values.iter().map(as_text).collect();
        texts.ok_or_else(|| WRONG.to_string())
    };
    match found {
        None => Ok((Vec::new(), Vec::new())),
        Some(Value::Object(fields)) => match (fields.get("text"), fields.get("label")) {
            (Some(text), Some(label)) => Ok((texts(text)?, texts(label)?)),
            (Some(text), None) => Ok((texts(text)?, Vec::new())),
            // {"A": "text", "B": "text"}
            _ => {
                let values: Option<Vec<String>> = fields.values().map(as_text).collect();
                Ok((values.ok_or(WRONG)?, fields.keys().cloned().collect()))
            }
        },
        Some(Value::Array(values)) if values.iter().all(Value::is_object) => {
            let of = |name: &str| -> Option<Vec<String>> {
                values.iter().map(|value| as_text(&value[name])).collect()
            };
            Ok((of("text").ok_or(WRONG)?, of("label").unwrap_or_default()))
        }
        Some(values) => Ok((texts(values)?, Vec::new())),
    }
}

/// The index of the right choice.
fn right_choice(value: &Value, texts: &[String], labels: &[String]) -> Option<usize> {
    if let Some(number) = value.as_u64() {
        return usize::try_from(number).ok();
    }
    let text = value.as_str()?.trim();
    if let Some(index) = labels.iter().position(|label| label == text) {
        return Some(index);
    }
    let bare = text.trim_matches(['(', ')', '.', ' ']);
    let mut characters = bare.chars();
    match (characters.next(), characters.next()) {
        (Some(one), None) if one.is_ascii_alphabetic() => {
            Some(usize::from(one.to_ascii_uppercase() as u8 - b'A'))
        }
        (Some(_), None) if labels.is_empty() && texts.iter().all(|t| *t != fold(text)) => {
            bare.parse().ok()
        }
        _ => texts.iter().position(|choice| *choice == fold(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn choice(line: Value) -> Result<Choice, String> {
        Choice::from_fields(line.as_object().unwrap())
    }

    #[test]
    fn the_field_s_forms_are_read() {
        for (line, expected) in [
            // MMLU
            (
                json!({"question": "q", "choices": ["0", "4", "2", "6"], "answer": 1}),
                'B',
            ),
            (
                json!({"question": "q", "choices": ["0", "4", "2", "6"], "answer": "D"}),
                'D',
            ),
            // ARC, both forms
            (
                json!({"question": {"stem": "s", "choices": [
                    {"text": "air", "label": "A"}, {"text": "oil", "label": "B"}]}, "answerKey": "B"}),
                'B',
            ),
            (
                json!({"question": "s", "choices": {"text": ["air", "oil", "sea"], "label": ["1", "2", "3"]},
                    "answerKey": "3"}),
                'C',
            ),
            // HellaSwag
            (
                json!({"ctx": "c", "endings": ["x", "y", "z", "w"], "label": "3"}),
                'D',
            ),
            (
                json!({"ctx": "c", "endings": ["x", "y", "z", "w"], "label": 0}),
                'A',
            ),
            // MMLU-Pro, GPQA, and by the choice's text
            (
                json!({"options": ["a", "b", "c"], "answer": "C", "answer_index": 2}),
                'C',
            ),
            (
                json!({"options": {"A": "red", "B": "blue"}, "answer": "B"}),
                'B',
            ),
            (json!({"choices": ["Red", "Blue"], "answer": "blue."}), 'B'),
            (json!({"choices": ["7", "8", "9"], "answer": "9"}), 'C'),
            (json!({"reference": "(h)"}), 'H'),
        ] {
            assert_eq!(choice(line.clone()).unwrap().letter(), expected, "{line}");
        }
    }

    #[test]
    fn lines_that_say_nothing_are_refused() {
        for (line, expected) in [
            (json!({"choices": ["a", "b"]}), "no right answer"),
            (
                json!({"choices": ["a", "b"], "answer": "C"}),
                "none of its 2 choices",
            ),
            (
                json!({"choices": ["a", "b"], "answer": 2}),
                "none of its 2 choices",
            ),
            (
                json!({"choices": ["a", "b"], "answer": "green"}),
                "none of its 2 choices",
            ),
            (
                json!({"choices": "a", "answer": 0}),
                "must be a list of texts",
            ),
            (
                json!({"choices": [["a"]], "answer": 0}),
                "must be a list of texts",
            ),
            (
                json!({"choices": vec!["a"; 27], "answer": 0}),
                "26 are the most",
            ),
        ] {
            let error = choice(line).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_choice_is_found_where_it_stands() {
        let verifier = choice(json!({
            "choices": ["Paris", "Rome", "New York", "6"], "answer": "C",
        }))
        .unwrap();
        for (text, expected) in [
            ("C", Some("C")),
            (" C\n", Some("C")),
            ("c)", Some("C")),
            ("(c)", Some("C")),
            ("C. New York", Some("C")),
            ("**C**: because", Some("C")),
            ("**C.** New York", Some("C")),
            ("The answer is C.", Some("C")),
            ("The answer is: (B) Rome", Some("B")),
            ("The answer is A, no, the answer is **D**", Some("D")),
            ("Final Answer: \\boxed{\\text{B}}", Some("B")),
            ("\\boxed{D} The answer is C", Some("D")),
            ("#### B", Some("B")),
            ("So it must be (A) or rather (D) here", Some("D")),
            ("The correct answer is New York.", Some("C")),
            ("It is Rome, without a doubt", Some("B")),
            ("new york.", Some("C")),
            ("Option B", Some("B")),
            ("It must be option D here", Some("D")),
            ("I think it is B", Some("B")),
            // Not choices.
            ("A city in France", None),
            ("Paris or Rome", None),
            ("There are 16 of them", None),
            ("E", None),
            ("", None),
            ("because", None),
            ("I do not know", None),
        ] {
            let verdict = verifier.verify(text).unwrap();
            assert_eq!(verdict.answer.as_deref(), expected, "{text:?}");
            assert_eq!(verdict.label == 1.0, expected == Some("C"), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "\\PC{0,60}|[ABab(). ]{0,20}|(answer is|boxed\\{|A)*\\PC{0,5}") {
            let verifier = choice(json!({"choices": ["é", "", "b"], "answer": 1})).unwrap();
            let verdict = verifier.verify(&text).unwrap();
            prop_assert!(verdict.answer.is_none_or(|answer| ["A", "B", "C"].contains(&&answer[..])));
        }
    }
}
