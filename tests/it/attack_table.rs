//! The table of attacks in docs/security.md, made from the tests: one that attacks says so in its
//! documentation, as `Attack: …` and `Outcome: …`.
//!
//! `LANEFSD_WRITE_ATTACK_TABLE=1 cargo test --test it attack_table` writes the table anew.

use std::fs;
use std::path::Path;

/// The order of the table: from the ring to the host. Any other file with attacks follows by its name.
const ORDER: [&str; 10] = [
    "hostile",
    "hostile_queues",
    "hostile_requests",
    "boundaries",
    "hostile_paths",
    "absolute_paths",
    "exhaustion",
    "hostile_front_end",
    "unreliable_host",
    "failing_host",
];
const BEGIN: &str = "| attack | outcome | test |\n|---|---|---|\n";
/// The least that the tests amount to; fewer means that they are not read right.
const LEAST: usize = 50;

/// One row.
struct Attack {
    attack: String,
    outcome: String,
    test: String,
}

/// The attacks in one file of tests.
fn attacks(file: &str, source: &str) -> Vec<Attack> {
    let mut found = Vec::new();
    let mut documentation = String::new();
    for line in source.lines() {
        if let Some(text) = line.strip_prefix("/// ") {
            documentation = format!("{documentation} {text}");
        } else if let Some(rest) = line.strip_prefix("fn ") {
            let name = rest.split('(').next().unwrap();
            if let Some((_, text)) = documentation.split_once("Attack: ") {
                let (attack, outcome) =
                    text.split_once(" Outcome: ").unwrap_or_else(|| panic!("{file}::{name} has no outcome"));
                assert!(source.contains(&format!("#[test]\nfn {name}()")), "{file}::{name} is no test");
                let sentence = |text: &str| text.trim().trim_end_matches('.').to_owned();
                let test = format!("{file}::{name}");
                found.push(Attack { attack: sentence(attack), outcome: sentence(outcome), test });
            }
            documentation.clear();
        } else if !line.starts_with("#[") {
            documentation.clear();
        }
    }
    found
}

/// All attacks, in the order of the table.
fn all(root: &Path) -> Vec<Attack> {
    let mut files: Vec<(usize, String)> = fs::read_dir(root.join("tests/it"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .map(|name| (ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len()), name))
        .collect();
    files.sort();
    let of =
        |name: &String| attacks(name, &fs::read_to_string(root.join(format!("tests/it/{name}.rs"))).unwrap());
    files.iter().flat_map(|(_, name)| of(name)).collect()
}

#[test]
fn the_table_in_the_document_is_that_of_the_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let all = all(root);
    assert!(all.len() >= LEAST, "only {} attacks were found", all.len());
    let rows: String = all
        .iter()
        .map(|Attack { attack, outcome, test }| format!("| {attack} | {outcome} | `{test}` |\n"))
        .collect();
    let path = root.join("docs/security.md");
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let after = rest.split_once("\n\n").map_or("", |(_, after)| after);
    let wanted = format!("{before}{BEGIN}{rows}\n{after}");
    if std::env::var_os("LANEFSD_WRITE_ATTACK_TABLE").is_some() {
        fs::write(&path, wanted).unwrap();
    } else {
        assert!(
            page == wanted,
            "docs/security.md differs from the tests: run LANEFSD_WRITE_ATTACK_TABLE=1 cargo test --test it attack_table"
        );
    }
}

#[test]
fn attacks_are_read_from_documentation() {
    let source = "/// Attack: many words\n/// on two lines.\n/// Outcome: none.\n#[test]\nfn one() {}\n\n\
                  /// Something else.\n#[test]\nfn two() {}\n";
    let found = attacks("file", source);
    assert_eq!(found.len(), 1);
    let Attack { attack, outcome, test } = found.first().unwrap();
    assert_eq!(
        (attack.as_str(), outcome.as_str(), test.as_str()),
        ("many words on two lines", "none", "file::one")
    );
}
