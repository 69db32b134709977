//! Mathematical expressions, plain or in LaTeX, as numbers: equal expressions have equal values.
//!
//! An expression with variables is evaluated at fixed points: polynomials and the like that agree at
//! all of them are the same.

use std::collections::BTreeSet;

/// How far equal values may lie apart, relative to the larger: what float64 leaves of expressions of
/// some tens of operations.
const TOLERANCE: f64 = 1e-9;
/// Points at which expressions with variables are compared.
const POINTS: u64 = 3;
/// Brackets in brackets; beyond it an expression is nobody's answer.
const DEPTH: usize = 50;
const LONGEST: usize = 1000;

/// Whether both are expressions, in the same variables, with the same value.
pub(super) fn equal(a: &str, b: &str) -> bool {
    let (Some(a), Some(b)) = (Tokens::read(a), Tokens::read(b)) else {
        return false;
    };
    if a.variables != b.variables {
        return false;
    }
    let points = if a.variables.is_empty() { 1 } else { POINTS };
    (0..points).all(|point| {
        let (Some(a), Some(b)) = (a.value(point), b.value(point)) else {
            return false;
        };
        a == b || (a - b).abs() <= TOLERANCE * a.abs().max(b.abs())
    })
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Number(f64),
    Variable(char),
    Function(&'static str),
    Pi,
    /// `\frac` and its kin.
    Fraction,
    Root,
    /// One of `+-*/^()[]{}`.
    Mark(char),
}

struct Tokens {
    tokens: Vec<Token>,
    variables: BTreeSet<char>,
}

impl Tokens {
    /// `None` where the text holds anything that is not understood.
    fn read(text: &str) -> Option<Tokens> {
        if text.len() > LONGEST {
            return None;
        }
        let mut tokens = Vec::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let after = &rest[first.len_utf8()..];
            rest = match first {
                c if c.is_whitespace() || "$~%".contains(c) => after,
                '0'..='9' | '.' => {
                    let (number, after) = number(rest)?;
                    tokens.push(Token::Number(number));
                    after
                }
                '\\' => command(after, &mut tokens)?,
                'a'..='z' | 'A'..='Z' => {
                    let end = after.find(|c: char| !c.is_ascii_alphabetic());
                    let (word, after) = rest.split_at(end.map_or(rest.len(), |end| end + 1));
                    letters(word, &mut tokens)?;
                    after
                }
                'π' => {
                    tokens.push(Token::Pi);
                    after
                }
                '×' | '·' => {
                    tokens.push(Token::Mark('*'));
                    after
                }
                '−' => {
                    tokens.push(Token::Mark('-'));
                    after
                }
                '°' => after,
                '√' => {
                    tokens.push(Token::Root);
                    after
                }
                c if "+-/^()[]{}".contains(c) => {
                    tokens.push(Token::Mark(c));
                    after
                }
                '*' => {
                    // Python's power.
                    let power = after.strip_prefix('*');
                    tokens.push(Token::Mark(if power.is_some() { '^' } else { '*' }));
                    power.unwrap_or(after)
                }
                _ => return None,
            };
        }
        let variables: BTreeSet<char> = tokens
            .iter()
            .filter_map(|token| match token {
                Token::Variable(name) => Some(*name),
                _ => None,
            })
            .collect();
        let is_a_word = tokens.len() > 1 && tokens.iter().all(|t| matches!(t, Token::Variable(_)));
        (!tokens.is_empty() && !is_a_word).then_some(Tokens { tokens, variables })
    }

    fn value(&self, point: u64) -> Option<f64> {
        let mut parser = Parser {
            tokens: &self.tokens,
            point,
            depth: 0,
        };
        let value = parser.sum()?;
        (parser.tokens.is_empty() && value.is_finite()).then_some(value)
    }
}

/// A number at the start: digits, perhaps with separators of thousands, decimals and an exponent.
fn number(text: &str) -> Option<(f64, &str)> {
    let bytes = text.as_bytes();
    let digits = |from: usize| {
        let run = bytes.get(from..).unwrap_or_default().iter();
        run.take_while(|byte| byte.is_ascii_digit()).count()
    };
    let mut plain = String::new();
    let mut end = digits(0);
    plain.push_str(&text[..end]);
    if (1..=3).contains(&end) {
        // 1,234 or 1{,}234
        loop {
            let comma = if text[end..].starts_with(',') { 1 } else { 3 };
            let separated = comma == 1 || text[end..].starts_with("{,}");
            if !separated || digits(end + comma) != 3 {
                break;
            }
            plain.push_str(&text[end + comma..][..3]);
            end += comma + 3;
        }
    }
    if text[end..].starts_with('.') {
        let decimals = digits(end + 1);
        plain.push_str(&text[end..][..1 + decimals]);
        end += 1 + decimals;
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
        let exponent = digits(end + 1 + sign);
        if exponent > 0 {
            plain.push_str(&text[end..][..1 + sign + exponent]);
            end += 1 + sign + exponent;
        }
    }
    Some((plain.parse().ok()?, &text[end..]))
}

/// What follows a backslash.
fn command<'a>(text: &'a str, tokens: &mut Vec<Token>) -> Option<&'a str> {
    let length = text
        .find(|c: char| !c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    if length == 0 {
        // `\,` and other spaces; `\$`, `\%`.
        let mark = text.chars().next()?;
        return "!,;: $%".contains(mark).then(|| &text[1..]);
    }
    let (name, rest) = text.split_at(length);
    match name {
        "frac" | "dfrac" | "tfrac" | "cfrac" => {
            tokens.push(Token::Fraction);
            // `\frac12` is a half.
            let digits: Vec<char> = rest.trim_start().chars().take(2).collect();
            if let [a @ '0'..='9', b @ '0'..='9'] = digits[..] {
                tokens.extend([a, b].map(|c| Token::Number(f64::from(c as u8 - b'0'))));
                return Some(&rest.trim_start()[2..]);
            }
        }
        "sqrt" => {
            tokens.push(Token::Root);
        }
        "pi" => tokens.push(Token::Pi),
        "cdot" | "times" | "ast" => tokens.push(Token::Mark('*')),
        "div" => tokens.push(Token::Mark('/')),
        "left" | "right" | "displaystyle" | "quad" | "limits" => {}
        "circ" => {
            // Degrees are written as a power.
            if tokens.last() == Some(&Token::Mark('{')) {
                tokens.pop();
                let closed = rest.trim_start().strip_prefix('}')?;
                return (tokens.pop()? == Token::Mark('^')).then_some(closed);
            }
            return (tokens.pop()? == Token::Mark('^')).then_some(rest);
        }
        name => tokens.push(Token::Function(function(name)?)),
    }
    Some(rest)
}

fn function(name: &str) -> Option<&'static str> {
    ["sin", "cos", "tan", "ln", "log", "exp"]
        .into_iter()
        .find(|known| *known == name)
}

/// A run of letters: a function, or at most two variables.
fn letters(word: &str, tokens: &mut Vec<Token>) -> Option<()> {
    match word {
        "pi" => tokens.push(Token::Pi),
        "sqrt" => tokens.push(Token::Root),
        word if word.len() <= 2 => tokens.extend(word.chars().map(Token::Variable)),
        word => tokens.push(Token::Function(function(word)?)),
    }
    Some(())
}

struct Parser<'a> {
    tokens: &'a [Token],
    point: u64,
    depth: usize,
}

impl Parser<'_> {
    fn next_is(&self, mark: char) -> bool {
        self.tokens.first() == Some(&Token::Mark(mark))
    }

    fn take(&mut self, mark: char) -> Option<()> {
        self.next_is(mark).then(|| self.skip())
    }

    fn skip(&mut self) {
        self.tokens = &self.tokens[1..];
    }

    fn sum(&mut self) -> Option<f64> {
        let mut sum = self.product()?;
        loop {
            if self.take('+').is_some() {
                sum += self.product()?;
            } else if self.take('-').is_some() {
                sum -= self.product()?;
            } else {
                return Some(sum);
            }
        }
    }

    fn product(&mut self) -> Option<f64> {
        let mut product = self.signed()?;
        loop {
            if self.take('*').is_some() {
                product *= self.signed()?;
            } else if self.take('/').is_some() {
                product /= self.signed()?;
            } else {
                match self.tokens.first() {
                    None | Some(Token::Mark('+' | '-' | '^' | ')' | ']' | '}')) => {
                        return Some(product);
                    }
                    // Two numbers side by side mean nothing.
                    Some(Token::Number(_)) => return None,
                    _ => product *= self.power()?,
                }
            }
        }
    }

    fn signed(&mut self) -> Option<f64> {
        self.deeper(|parser| {
            if parser.take('-').is_some() {
                Some(-parser.signed()?)
            } else if parser.take('+').is_some() {
                parser.signed()
            } else {
                parser.power()
            }
        })
    }

    fn power(&mut self) -> Option<f64> {
        let base = self.operand()?;
        match self.take('^') {
            None => Some(base),
            Some(()) => Some(base.powf(self.signed()?)),
        }
    }

    fn operand(&mut self) -> Option<f64> {
        let token = self.tokens.first()?.clone();
        self.skip();
        match token {
            Token::Number(number) => {
                // 1\frac{1}{2} and 1 1/2 are mixed numbers.
                if number.fract() == 0.0 && self.tokens.first() == Some(&Token::Fraction) {
                    let before = self.tokens;
                    self.skip();
                    let fraction = self.fraction()?;
                    if (0.0..1.0).contains(&fraction) {
                        return Some(number + fraction);
                    }
                    self.tokens = before;
                } else if let [
                    Token::Number(above),
                    Token::Mark('/'),
                    Token::Number(below),
                    rest @ ..,
                ] = self.tokens
                    && number.fract() == 0.0
                    && above < below
                {
                    self.tokens = rest;
                    return Some(number + above / below);
                }
                Some(number)
            }
            Token::Variable(name) => Some(value_of(name, self.point)),
            Token::Pi => Some(std::f64::consts::PI),
            Token::Fraction => self.fraction(),
            Token::Root => {
                let degree = match self.take('[') {
                    Some(()) => {
                        let degree = self.deeper(Self::sum)?;
                        self.take(']')?;
                        degree
                    }
                    None => 2.0,
                };
                let of = self.deeper(Self::operand)?;
                Some(if degree == 2.0 {
                    of.sqrt()
                } else {
                    of.powf(1.0 / degree)
                })
            }
            Token::Function(name) => {
                let of = self.deeper(Self::power)?;
                Some(match name {
                    "sin" => of.sin(),
                    "cos" => of.cos(),
                    "tan" => of.tan(),
                    "ln" => of.ln(),
                    "log" => of.log10(),
                    _ => of.exp(),
                })
            }
            Token::Mark(open @ ('(' | '[' | '{')) => {
                let value = self.deeper(Self::sum)?;
                self.take(match open {
                    '(' => ')',
                    '[' => ']',
                    _ => '}',
                })?;
                Some(value)
            }
            Token::Mark(_) => None,
        }
    }

    fn fraction(&mut self) -> Option<f64> {
        let above = self.deeper(Self::operand)?;
        let below = self.deeper(Self::operand)?;
        Some(above / below)
    }

    fn deeper(&mut self, parse: impl FnOnce(&mut Self) -> Option<f64>) -> Option<f64> {
        if self.depth == DEPTH {
            return None;
        }
        self.depth += 1;
        let value = parse(self);
        self.depth -= 1;
        value
    }
}

/// A variable's value at a point: between 0.5 and 2.5, another for each.
fn value_of(name: char, point: u64) -> f64 {
    let mixed = (u64::from(name) << 8 | point).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    0.5 + 2.0 * ((mixed >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value(text: &str) -> Option<f64> {
        Tokens::read(text)?.value(0)
    }

    #[test]
    fn values() {
        let (pi, root) = (std::f64::consts::PI, 3f64.sqrt());
        for (text, expected) in [
            ("3", 3.0),
            ("-3.50", -3.5),
            (".5", 0.5),
            ("1,234,567", 1234567.0),
            ("1{,}234", 1234.0),
            ("1e3", 1000.0),
            ("1.5E-2", 0.015),
            (r"1.5\times10^{3}", 1500.0),
            (r"1.5 \cdot 10^3", 1500.0),
            ("2**10", 1024.0),
            ("1/2", 0.5),
            (r"\frac{1}{2}", 0.5),
            (r"\dfrac12", 0.5),
            (r"\frac{3}4", 0.75),
            (r"-\tfrac{\pi}{3}", -pi / 3.0),
            (r"1\frac{1}{2}", 1.5),
            ("1 1/2", 1.5),
            (r"2\frac{\sqrt{3}}{1}", 2.0 * root),
            (r"\frac{\sqrt{3}}{2}", root / 2.0),
            (r"2\sqrt{3}", 2.0 * root),
            (r"\sqrt 3", root),
            (r"\sqrt[3]{8}", 2.0),
            ("sqrt(9)", 3.0),
            ("√9", 3.0),
            ("2π", 2.0 * pi),
            (r"\left(1+2\right)\cdot 3", 9.0),
            ("2(3+4)", 14.0),
            ("[1+2]3", f64::NAN),
            ("2^{-1}", 0.5),
            ("-2^2", -4.0),
            ("2^3^2", 512.0),
            ("50\\%", 50.0),
            (r"\$18", 18.0),
            (r"90^\circ", 90.0),
            (r"90^{\circ}", 90.0),
            ("90°", 90.0),
            (r"\cos(0)", 1.0),
            (r"\ln 1", 0.0),
            (r"10\,000", f64::NAN),
            ("3 4", f64::NAN),
            ("2+", f64::NAN),
            ("(2", f64::NAN),
            ("2)", f64::NAN),
            ("1/0", f64::NAN),
            (r"\sqrt{-1}", f64::NAN),
            (r"\foo{2}", f64::NAN),
            (r"\text{east}", f64::NAN),
            ("", f64::NAN),
        ] {
            match value(text) {
                Some(found) => {
                    assert!(
                        (found - expected).abs() < 1e-12 * expected.abs().max(1.0),
                        "{text}: {found}"
                    );
                }
                None => assert!(expected.is_nan(), "{text} has no value"),
            }
        }
    }

    #[test]
    fn equal_expressions_are_equal() {
        for (a, b, same) in [
            (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", true),
            (r"2\sqrt{3}", r"\sqrt{12}", true),
            ("x^2+1", "1 + x^{2}", true),
            ("(x+1)^2", "x^2+2x+1", true),
            ("2xy", "y x*2", true),
            (r"\frac{1}{2x}", "1/(2x)", true),
            (r"\frac12 x", "x/2", true),
            ("x+1", "y+1", false),
            ("x+1", "x+2", false),
            ("x", "x^2", false),
            ("3", "3.0000001", false),
            ("east", "seat", false),
            ("no", "on", false),
            ("x", "x", true),
            ("0", "0.0", true),
        ] {
            assert_eq!(equal(a, b), same, "{a} and {b}");
            assert_eq!(equal(b, a), same, "{b} and {a}");
        }
    }

    #[test]
    fn depth_and_length_have_an_end() {
        assert_eq!(value(&"(".repeat(900)), None);
        assert_eq!(value(&"-".repeat(900)), None);
        assert_eq!(value(&r"\frac".repeat(190)), None);
        assert_eq!(value(&r"\sqrt".repeat(190)), None);
        assert_eq!(value(&"1+".repeat(1000)), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "\\PC{0,40}|[0-9.,+*/^()\\[\\]{}a-c\\\\ ]{0,40}|(\\\\frac|\\\\sqrt|\\^|\\{|\\}|1|x|\\\\circ){0,12}") {
            if let Some(tokens) = Tokens::read(&text) {
                tokens.value(0);
            }
        }

        #[test]
        fn sums_and_products_of_integers(a in -1000i64..1000, b in 1i64..1000, c in -1000i64..1000) {
            let (x, y, z) = (a as f64, b as f64, c as f64);
            let text = format!("{a}/{b} - ({c})*{b} + \\frac{{{c}}}{{{b}}}");
            let expected = x / y - z * y + z / y;
            let found = value(&text).unwrap();
            prop_assert!((found - expected).abs() <= 1e-12 * (1.0 + expected.abs() + (z * y).abs()));
        }
    }
}
