//! Brings a chat template into the dialect of the template library.
//!
//! Compiling an expression takes the library time quadratic in its length, so the lengths are
//! limited here. Two statements of transformers' dialect are respelled, in place, so that line numbers hold:
//!
//! - `{% generation %} … {% endgeneration %}` marks what a model wrote, for training; it becomes
//!   `{% with %} … {% endwith %}`, which scopes assignments alike.
//! - `{% set ns.name = value %}` becomes a method call on our own
//!   [namespace](super::template_functions::Namespace). The library's own namespaces can hold
//!   themselves, and printing such a one overflows the stack.

use std::ops::Range;

use super::template_functions::SET_ATTRIBUTE;

/// The sum of the squared lengths of all tags, strings aside: one tag of 8 kB, or thousands of
/// usual size. A template at the limit compiles in about a second.
const MAX_SQUARED_LENGTHS: usize = 1 << 26;

/// Respells `source`; the error says what is wrong with it.
pub(super) fn respell(source: &str) -> Result<String, String> {
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let mut at = 0;
    let mut squared_lengths = 0usize;
    while let Some(tag) = next_tag(source, at)? {
        squared_lengths = squared_lengths.saturating_add(tag.code_bytes.pow(2));
        if squared_lengths > MAX_SQUARED_LENGTHS {
            let line = source[..tag.inner.start].matches('\n').count() + 1;
            return Err(format!("the expression in line {line} is too long"));
        }
        let inner = &source[tag.inner.clone()];
        out.push_str(&source[at..tag.inner.start]);
        match statement(inner) {
            _ if tag.kind != TagKind::Statement => out.push_str(inner),
            Statement::Generation => out.push_str(&inner.replacen("generation", "with", 1)),
            Statement::EndGeneration => {
                out.push_str(&inner.replacen("endgeneration", "endwith", 1));
            }
            Statement::SetAttribute { name, value } => {
                let name = &inner[name];
                let (object, attribute) = name.split_once('.').unwrap_or((name, ""));
                let (head, tail) = markers(inner);
                out.push_str(head);
                out.push_str(&format!(
                    " do {}.{SET_ATTRIBUTE}(\"{}\", ({})) ",
                    object.trim(),
                    attribute.trim(),
                    &inner[value],
                ));
                out.push_str(tail);
            }
            Statement::SetAttributeBlock => {
                return Err(format!(
                    "a block assignment to a namespace attribute is not supported: {{%{inner}%}}"
                ));
            }
            Statement::Raw => {
                // Up to the end of the raw block, nothing is a tag.
                let body = tag.inner.end + 2;
                let end = end_of_raw(source, body).ok_or("a raw block is not closed")?;
                out.push_str(&source[tag.inner.start..end]);
                at = end;
                continue;
            }
            Statement::Other => out.push_str(inner),
        }
        at = tag.inner.end;
    }
    out.push_str(&source[at..]);
    Ok(out)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TagKind {
    Statement,
    Expression,
    Comment,
}

struct Tag {
    kind: TagKind,
    /// What is between the two-byte delimiters.
    inner: Range<usize>,
    /// Bytes of it that are neither string nor comment.
    code_bytes: usize,
}

/// The first tag whose opening delimiter is at or after `from`.
///
/// `from` may be the end of a tag's inner part: a closing delimiter opens nothing.
fn next_tag(source: &str, from: usize) -> Result<Option<Tag>, String> {
    let bytes = source.as_bytes();
    let mut at = from;
    while at + 1 < bytes.len() {
        let (kind, close) = match &bytes[at..at + 2] {
            b"{%" => (TagKind::Statement, b"%}"),
            b"{{" => (TagKind::Expression, b"}}"),
            b"{#" => (TagKind::Comment, b"#}"),
            _ => {
                at += 1;
                continue;
            }
        };
        let start = at + 2;
        let (end, code_bytes) = end_of_tag(bytes, start, kind, close).ok_or_else(|| {
            let line = source[..at].matches('\n').count() + 1;
            format!("the tag opened in line {line} is not closed")
        })?;
        return Ok(Some(Tag {
            kind,
            inner: start..end,
            code_bytes,
        }));
    }
    Ok(None)
}

/// Where the closing delimiter begins, outside of strings and nested braces, and how many bytes
/// before it are code.
fn end_of_tag(
    bytes: &[u8],
    start: usize,
    kind: TagKind,
    close: &[u8; 2],
) -> Option<(usize, usize)> {
    let mut at = start;
    let mut quote = None;
    let mut braces = 0usize;
    let mut code_bytes = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        if kind == TagKind::Comment {
            if bytes[at..].starts_with(close) {
                return Some((at, 0));
            }
        } else if let Some(open) = quote {
            if byte == b'\\' {
                at += 1;
            } else if byte == open {
                quote = None;
            }
        } else if braces == 0 && bytes[at..].starts_with(close) {
            return Some((at, code_bytes));
        } else {
            code_bytes += 1;
            match byte {
                b'\'' | b'"' => quote = Some(byte),
                b'{' => braces += 1,
                b'}' => braces = braces.saturating_sub(1),
                _ => {}
            }
        }
        at += 1;
    }
    None
}

/// Where the `{% endraw %}` tag begins.
fn end_of_raw(source: &str, from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        let open = at + source[at..].find("{%")?;
        let inner = source[open + 2..].trim_start_matches(['-', '+']);
        if let Some(rest) = inner.trim_start().strip_prefix("endraw") {
            let rest = rest.trim_start();
            if rest.trim_start_matches(['-', '+']).starts_with("%}") {
                return Some(open);
            }
        }
        at = open + 2;
    }
}

/// The whitespace-control markers at both ends of a statement.
fn markers(inner: &str) -> (&str, &str) {
    let head = usize::from(inner.starts_with(['-', '+']));
    let tail = usize::from(inner.len() > head && inner.ends_with(['-', '+']));
    (&inner[..head], &inner[inner.len() - tail..])
}

enum Statement {
    Generation,
    EndGeneration,
    Raw,
    /// Byte ranges in the statement.
    SetAttribute {
        name: Range<usize>,
        value: Range<usize>,
    },
    SetAttributeBlock,
    Other,
}

fn statement(inner: &str) -> Statement {
    let (head, tail) = markers(inner);
    let body = &inner[head.len()..inner.len() - tail.len()];
    match body.trim() {
        "generation" => return Statement::Generation,
        "endgeneration" => return Statement::EndGeneration,
        "raw" => return Statement::Raw,
        _ => {}
    }
    let Some(target) = body.trim_start().strip_prefix("set") else {
        return Statement::Other;
    };
    if !target.starts_with(char::is_whitespace) {
        return Statement::Other;
    }
    let end = target
        .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.' || c.is_whitespace()))
        .unwrap_or(target.len());
    let name = &target[..end];
    if !name.contains('.') {
        return Statement::Other;
    }
    let start_of_target = head.len() + (body.len() - target.len());
    let rest = &target[end..];
    if rest.starts_with('=') && !rest.starts_with("==") {
        Statement::SetAttribute {
            name: start_of_target..start_of_target + end,
            value: start_of_target + end + 1..inner.len() - tail.len(),
        }
    } else if rest.is_empty() || rest.starts_with('|') {
        Statement::SetAttributeBlock
    } else {
        Statement::Other
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn generation_becomes_a_scope() {
        assert_eq!(
            respell("a{%- generation -%}b{% endgeneration %}generation").unwrap(),
            "a{%- with -%}b{% endwith %}generation"
        );
    }

    #[test]
    fn attribute_assignments_become_calls() {
        assert_eq!(
            respell("{%- set ns.last = a if b else '%}' -%}x{% set y = ns.last %}").unwrap(),
            "{%- do ns.__set__(\"last\", ( a if b else '%}' )) -%}x{% set y = ns.last %}"
        );
        assert_eq!(
            respell("{%set ns . a={'b': {'c': 1}}%}{{ ns.a }}").unwrap(),
            "{% do ns.__set__(\"a\", ({'b': {'c': 1}})) %}{{ ns.a }}"
        );
        assert!(respell("{% set ns.a %}x{% endset %}").is_err());
    }

    #[test]
    fn everything_else_is_left_alone() {
        for source in [
            "",
            "{",
            "plain { text } % with } braces",
            "{{ {'a': {'b': 1}}['a'] }}{{ '}}' }}",
            "{% set x = 1 %}{% set a, b = ns.a, 2 %}{% settle %}",
            "{# {% set ns.a = 1 %} {{ #}",
            "{% raw %}{% set ns.a = 1 %}{{ {%- endraw -%}",
            "{{ \"it's {% set ns.a = 1 %}\" }}",
            "ünïcode {{ 'é\\'' }} 漢字",
        ] {
            assert_eq!(respell(source).unwrap(), source);
        }
    }

    #[test]
    fn unclosed_and_endless_tags_are_named() {
        assert!(respell("a\n{{ b").unwrap_err().contains("line 2"));
        assert!(respell("{% raw %}").unwrap_err().contains("raw"));
        assert!(respell("{% set ns.a = '%}").is_err());
        let long = format!("a\n{{{{ {}1 }}}}", "1~".repeat(5_000));
        assert!(respell(&long).unwrap_err().contains("line 2 is too long"));
        let many = "{{ message.role ~ message.content }}".repeat(7_000);
        assert_eq!(respell(&many).unwrap(), many);
        let text = format!("{{{{ '{}' }}}}", "a".repeat(100_000));
        assert_eq!(respell(&text).unwrap(), text);
    }

    proptest! {
        #[test]
        fn never_panics(pieces in prop::collection::vec(prop::sample::select(vec![
            "{%", "%}", "{{", "}}", "{#", "#}", "-", "+", " ", "set", "ns.a", "=", "raw", "endraw",
            "generation", "'", "\"", "\\", "é", "\n", ".", "{", "}",
        ]), 0..30)) {
            let _ = respell(&pieces.concat());
        }
    }
}
