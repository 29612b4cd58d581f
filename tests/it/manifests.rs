//! All packages agree: members of the workspace inherit its data, dependencies and lints, and `fuzz/`, which is a
//! workspace of its own (see its manifest), repeats them word for word.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Data of a package that the workspace gives.
const INHERITED: [&str; 6] = ["version", "authors", "edition", "rust-version", "license", "publish"];

/// Sections of a manifest, and their `key = value` lines. Each entry stands on one line.
type Manifest = BTreeMap<String, BTreeMap<String, String>>;

fn parse(text: &str) -> Manifest {
    let mut sections = Manifest::new();
    let mut section = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.trim_matches(['[', ']']).to_owned();
            sections.entry(section.clone()).or_default();
        } else if let Some((key, value)) = line.split_once(" = ")
            && !line.starts_with(['#', ' '])
        {
            sections.entry(section.clone()).or_default().insert(key.to_owned(), value.to_owned());
        }
    }
    sections
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> Manifest {
    let path = root().join(path);
    parse(&fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// The entries of a section; none where it is missing.
fn section<'a>(manifest: &'a Manifest, name: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
    manifest.get(name).into_iter().flatten().map(|(key, value)| (key.as_str(), value.as_str()))
}

/// Every folder with a package, the root's among them, that is a member of the workspace.
fn members() -> Vec<String> {
    let text = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let (_, rest) = text.split_once("members = [").unwrap();
    let (list, _) = rest.split_once(']').unwrap();
    let named = list.split(',').map(|name| name.trim().trim_matches('"').to_owned());
    named.filter(|name| !name.is_empty()).chain([".".to_owned()]).collect()
}

/// What a member does not inherit, though the workspace has it.
fn not_inherited(manifest: &Manifest) -> Vec<String> {
    let package = INHERITED
        .iter()
        .filter(|key| section(manifest, "package").all(|(found, _)| found != format!("{key}.workspace")))
        .map(|key| format!("package.{key}"));
    let lints =
        (section(manifest, "lints").next() != Some(("workspace", "true"))).then(|| "lints".to_owned());
    let dependencies = manifest.iter().filter(|(name, _)| {
        name.ends_with("dependencies") && !name.starts_with("workspace.") && !name.starts_with("target.")
    });
    let inherited =
        |(key, value): &(&String, &String)| key.ends_with(".workspace") || value.contains("workspace = true");
    let own = dependencies.flat_map(|(_, entries)| entries).filter(|entry| !inherited(entry));
    let own = own.map(|(key, _)| format!("dependencies.{key}"));
    package.chain(lints).chain(own).collect()
}

/// The version of a dependency, without its features; the path of one that has a path.
fn version(entry: &str) -> &str {
    let quoted = entry.split_once("version = ").map_or(entry, |(_, rest)| rest);
    quoted.split('"').nth(1).unwrap_or_default()
}

/// What a manifest outside the workspace says otherwise than the workspace does.
fn differs(workspace: &Manifest, other: &Manifest) -> Vec<String> {
    let mut found = Vec::new();
    for key in INHERITED {
        let of = |manifest: &Manifest, name: &str| {
            section(manifest, name).find(|(found, _)| *found == key).map(|(_, value)| value.to_owned())
        };
        if of(workspace, "workspace.package") != of(other, "package") {
            found.push(format!("package.{key}"));
        }
    }
    for lints in ["lints.rust", "lints.clippy"] {
        let wanted: Vec<_> = section(workspace, &format!("workspace.{lints}")).collect();
        if section(other, lints).collect::<Vec<_>>() != wanted {
            found.push(lints.to_owned());
        }
    }
    for (name, entry) in section(other, "dependencies").filter(|(_, entry)| !entry.contains("path = ")) {
        let known = section(workspace, "workspace.dependencies").find(|(known, _)| *known == name);
        if known.is_some_and(|(_, known)| version(known) != version(entry)) {
            found.push(format!("dependencies.{name}"));
        }
    }
    found
}

#[test]
fn every_member_inherits_what_the_workspace_has() {
    let members = members();
    assert!(members.len() > 5, "only {members:?}");
    for member in members {
        let own = not_inherited(&read(Path::new(&member).join("Cargo.toml")));
        assert!(own.is_empty(), "{member}/Cargo.toml has its own {own:?}");
    }
}

#[test]
fn the_fuzz_targets_have_the_versions_and_lints_of_the_workspace() {
    let differing = differs(&read("Cargo.toml"), &read("fuzz/Cargo.toml"));
    assert!(differing.is_empty(), "fuzz/Cargo.toml differs from the workspace in {differing:?}");
}

#[test]
fn a_manifest_with_versions_of_its_own_is_found() {
    let workspace = parse(
        "[workspace.package]\nversion = \"1.0\"\n[workspace.lints.rust]\nmissing_docs = \"warn\"\n\
         [workspace.dependencies]\nlibc = \"0.2\"\n",
    );
    let other =
        parse("[package]\nversion = \"1.1\"\n[dependencies]\nlibc = { version = \"0.1\" }\nown = \"3\"\n");
    assert_eq!(differs(&workspace, &other), ["package.version", "lints.rust", "dependencies.libc"]);
    let member =
        parse("[package]\nversion.workspace = true\n[dependencies]\nlibc = \"0.2\"\nlog.workspace = true\n");
    let own = not_inherited(&member);
    assert!(own.contains(&"dependencies.libc".to_owned()) && own.contains(&"lints".to_owned()), "{own:?}");
    assert!(own.contains(&"package.edition".to_owned()), "{own:?}");
    assert!(!own.contains(&"dependencies.log.workspace".to_owned()), "{own:?}");
}
