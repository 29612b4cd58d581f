//! As much of Rust's syntax as the layout of the sources needs: what is code, where functions end, which paths it
//! names.

/// The code of a file: comments and the contents of literals are blank, lines are where they were.
pub fn code_of(source: &str) -> String {
    let text: Vec<char> = source.chars().collect();
    let mut code = text.clone();
    let mut at = 0;
    while let Some(&found) = text.get(at) {
        let end = match found {
            '/' if text.get(at + 1) == Some(&'/') => find(&text, at, |rest| rest[0] == '\n'),
            '/' if text.get(at + 1) == Some(&'*') => end_of_comment(&text, at),
            '"' => end_of_string(&text, at),
            'r' if begins_raw_string(&text, at) => end_of_raw_string(&text, at),
            '\'' => end_of_character(&text, at),
            _ => at,
        };
        for blank in code.iter_mut().take(end).skip(at) {
            if *blank != '\n' {
                *blank = ' ';
            }
        }
        at = end.max(at + 1);
    }
    code.into_iter().collect()
}

/// The first place from `at` on where the rest is as wanted, or the end.
fn find(text: &[char], at: usize, is_it: impl Fn(&[char]) -> bool) -> usize {
    (at..text.len()).find(|place| is_it(&text[*place..])).unwrap_or(text.len())
}

fn end_of_comment(text: &[char], at: usize) -> usize {
    let mut depth = 0;
    let mut place = at;
    while place + 1 < text.len() {
        match (text[place], text[place + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                place += 1;
                continue;
            }
        }
        place += 2;
        if depth == 0 {
            return place;
        }
    }
    text.len()
}

fn end_of_string(text: &[char], at: usize) -> usize {
    let mut place = at + 1;
    while place < text.len() && text[place] != '"' {
        place += if text[place] == '\\' { 2 } else { 1 };
    }
    (place + 1).min(text.len())
}

fn is_identifier(found: char) -> bool {
    found.is_alphanumeric() || found == '_'
}

/// Whether the `r` at this place begins `r"` or `r#"`, and is no part of a name.
fn begins_raw_string(text: &[char], at: usize) -> bool {
    let before = at.checked_sub(1).map_or(' ', |before| text[before]);
    let mut rest = text[at + 1..].iter().skip_while(|hash| **hash == '#');
    (!is_identifier(before) || matches!(before, 'b' | 'c')) && rest.next() == Some(&'"')
}

fn end_of_raw_string(text: &[char], at: usize) -> usize {
    let hashes = text[at + 1..].iter().take_while(|hash| **hash == '#').count();
    let is_end = |rest: &[char]| rest[0] == '"' && rest[1..].iter().take(hashes).all(|hash| *hash == '#');
    (find(text, at + hashes + 2, is_end) + 1 + hashes).min(text.len())
}

/// The end of a literal like `'a'`; `at` itself for a lifetime.
fn end_of_character(text: &[char], at: usize) -> usize {
    match (text.get(at + 1), text.get(at + 2)) {
        (Some('\\'), _) => (find(text, at + 3, |rest| rest[0] == '\'') + 1).min(text.len()),
        (_, Some('\'')) => at + 3,
        _ => at,
    }
}

/// Code without what is only built for tests.
pub fn production(code: &str) -> String {
    let mut kept = code.to_owned();
    while let Some(begin) = ["#[cfg(test)]", "#[cfg(all(test"].iter().filter_map(|cfg| kept.find(cfg)).min() {
        let end = end_of_item(&kept, begin);
        let lines = "\n".repeat(kept[begin..end].matches('\n').count());
        kept.replace_range(begin..end, &lines);
    }
    kept
}

/// Behind the item that begins here: its semicolon, or the brace that ends its body.
fn end_of_item(code: &str, begin: usize) -> usize {
    let (mut nested, mut braces) = (0, 0);
    for (offset, found) in code[begin..].char_indices() {
        match found {
            '(' | '[' => nested += 1,
            ')' | ']' => nested -= 1,
            '{' => braces += 1,
            '}' => braces -= 1,
            _ => {}
        }
        if (found == ';' && nested == 0 && braces == 0) || (found == '}' && braces <= 0) {
            return begin + offset + 1;
        }
    }
    code.len()
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The line on which it begins, from 1.
    pub line: usize,
    /// How many lines it has, those of its signature and its last brace too.
    pub length: usize,
}

/// All functions in the code, also those inside others.
pub fn functions(code: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for (begin, _) in code.match_indices("fn ") {
        let is_word = !code[..begin].ends_with(is_identifier);
        let name: String = code[begin + 3..].chars().take_while(|part| is_identifier(*part)).collect();
        if !is_word || name.is_empty() {
            continue;
        }
        let text = &code[begin..end_of_item(code, begin)];
        if text.ends_with('}') {
            let line = code[..begin].matches('\n').count() + 1;
            found.push(Function { name, line, length: text.matches('\n').count() + 1 });
        }
    }
    found
}

/// A path as it is written, in its parts, and whether a `use` declaration has it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Named {
    /// Its parts.
    pub parts: Vec<String>,
    /// Whether it stands in a `use` declaration, where it may begin with a child module.
    pub is_use: bool,
}

/// All paths of more than one part in `use` declarations, and those elsewhere that begin with one of these words.
pub fn paths(code: &str, beginnings: &[&str]) -> Vec<Named> {
    let mut found = Vec::new();
    for (begin, _) in code.match_indices("use ") {
        if !code[..begin].ends_with(is_identifier) {
            let tree = code[begin + 4..].split(';').next().unwrap_or_default();
            branches(&[], tree, &mut found);
        }
    }
    for (begin, _) in code.match_indices("::") {
        let head: String = code[..begin].chars().rev().take_while(|part| is_identifier(*part)).collect();
        let head: String = head.chars().rev().collect();
        let is_first = !code[..begin - head.len()].ends_with("::");
        if is_first && beginnings.contains(&head.as_str()) {
            let rest = &code[begin..];
            let length = rest.find(|part: char| !is_identifier(part) && part != ':').unwrap_or(rest.len());
            let path = format!("{head}{}", &rest[..length]);
            let parts = path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
            found.push(Named { parts, is_use: false });
        }
    }
    found
}

/// The paths of a tree like `a::{b, c::{self, D}}` behind the parts before it.
fn branches(before: &[String], tree: &str, found: &mut Vec<Named>) {
    let mut depth = 0;
    let at_comma = |part: char| {
        depth += i32::from(part == '{') - i32::from(part == '}');
        part == ',' && depth == 0
    };
    for branch in tree.split(at_comma).map(str::trim).filter(|branch| !branch.is_empty()) {
        let (path, inner) =
            branch.split_once('{').map_or((branch, None), |(path, inner)| (path, Some(inner)));
        let path = path.split(" as ").next().unwrap_or_default();
        let own = path.split("::").map(str::trim).filter(|part| !part.is_empty() && *part != "*");
        let parts: Vec<String> = before.iter().cloned().chain(own.map(str::to_owned)).collect();
        match inner.and_then(|inner| inner.rsplit_once('}')) {
            Some((inner, _)) => branches(&parts, inner, found),
            None => found.push(Named { parts, is_use: true }),
        }
    }
}
