//! Which file of a crate imports from which: its `use` lines, and the paths that its code spells out, each resolved to the file of the
//! module that it names. What is imported from a module that only imports it itself counts as an import of that module, and a module
//! that uses a child of its own imports it. Left out are what `#[cfg(test)]` names, and other crates: Cargo keeps circles out of those.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A file's text; an error where there is none.
type Read<'a> = &'a dyn Fn(&Path) -> Result<String, String>;

/// The imports between files: importer, imported, and a path that names it.
#[derive(Debug, Default)]
pub(crate) struct Imports(BTreeMap<PathBuf, BTreeMap<PathBuf, String>>);

impl Imports {
    /// Adds the files of the crate whose root file is `root`.
    pub(crate) fn add_crate(&mut self, root: &Path, read: Read<'_>) -> Result<(), String> {
        let modules = Modules::read(root, read)?;
        for (at, module) in modules.0.iter().enumerate() {
            let importer = self.0.entry(module.file.clone()).or_default();
            for path in paths(&module.code) {
                let imported = modules.resolve(at, &path).map(|module| &modules.0[module].file);
                if let Some(imported) = imported.filter(|file| **file != module.file) {
                    importer.entry(imported.clone()).or_insert_with(|| path.join("::"));
                }
            }
        }
        Ok(())
    }

    pub(crate) fn files(&self) -> usize {
        self.0.len()
    }

    /// For every file that imports itself through others, the shortest way on which it does; each circle once, in the order of imports.
    pub(crate) fn circles(&self) -> Vec<Vec<&Path>> {
        let mut circles: Vec<_> = self.0.keys().filter_map(|file| self.circle(file)).collect();
        for circle in &mut circles {
            let first = (0..circle.len()).min_by_key(|&at| circle[at]).unwrap_or_default();
            circle.rotate_left(first);
        }
        circles.sort_unstable();
        circles.dedup();
        circles
    }

    /// A line of a circle: its files, each with what it imports of the next one.
    pub(crate) fn line(&self, circle: &[&Path]) -> String {
        let next = circle.iter().cycle().skip(1);
        let step =
            |(file, next): (&&Path, &&Path)| format!("{} ({}) -> ", file.display(), self.0[*file][*next]);
        let steps: String = circle.iter().zip(next).map(step).collect();
        steps + &circle[0].display().to_string()
    }

    fn circle<'a>(&'a self, file: &'a Path) -> Option<Vec<&'a Path>> {
        let (mut importers, mut queue) = (BTreeMap::new(), VecDeque::from([file]));
        while let Some(importer) = queue.pop_front() {
            for imported in self.0[importer].keys().map(PathBuf::as_path) {
                if imported == file {
                    let before = |file: &&Path| importers.get(file).copied();
                    let mut circle: Vec<_> = std::iter::successors(Some(importer), before).collect();
                    circle.reverse();
                    return Some(circle);
                }
                if !importers.contains_key(imported) {
                    importers.insert(imported, importer);
                    queue.push_back(imported);
                }
            }
        }
        None
    }
}

/// A crate's modules; the first is its root.
struct Modules(Vec<Module>);

struct Module {
    file: PathBuf,
    parent: usize,
    children: BTreeMap<String, usize>,
    /// Without the modules that it declares.
    code: Vec<TokenTree>,
}

impl Modules {
    fn read(root: &Path, read: Read<'_>) -> Result<Self, String> {
        let mut modules = Self(vec![]);
        let folder = root.parent().unwrap_or(Path::new(""));
        modules.add(root, 0, parse(root, read)?, folder, read)?;
        Ok(modules)
    }

    /// Adds a module and those that it declares, whose files are in `folder`.
    fn add(
        &mut self,
        file: &Path,
        parent: usize,
        code: Vec<TokenTree>,
        folder: &Path,
        read: Read<'_>,
    ) -> Result<usize, String> {
        let this = self.0.len();
        self.0.push(Module { file: file.into(), parent, children: BTreeMap::new(), code: vec![] });
        let mut code = code.into_iter();
        while let Some(token) = code.next() {
            let name = match code.as_slice() {
                [TokenTree::Ident(name), body, ..] if is_word(&token, "mod") => {
                    Some((name.to_string(), body.clone()))
                }
                _ => None,
            };
            let Some((name, body)) = name else {
                self.0[this].code.push(token);
                continue;
            };
            code.nth(1);
            let inside = folder.join(&name);
            let child = match body {
                TokenTree::Group(body) => {
                    self.add(file, this, body.stream().into_iter().collect(), &inside, read)?
                }
                _ => {
                    let (beside, within) = (folder.join(format!("{name}.rs")), inside.join("mod.rs"));
                    let (file, code) = match parse(&beside, read) {
                        Ok(code) => (beside, code),
                        Err(_) => (within.clone(), parse(&within, read)?),
                    };
                    self.add(&file, this, code, &inside, read)?
                }
            };
            self.0[this].children.insert(name, child);
        }
        Ok(this)
    }

    /// The module that a path names, or that has the item which it names; none where it leads to another crate.
    fn resolve(&self, from: usize, path: &[String]) -> Option<usize> {
        let (first, mut rest) = path.split_first()?;
        let mut module = match first.as_str() {
            "crate" => 0,
            "self" => from,
            "super" => self.0[from].parent,
            name => *self.0[from].children.get(name)?,
        };
        while let Some((name, after)) = rest.split_first() {
            module = match self.0[module].children.get(name) {
                _ if name == "super" => self.0[module].parent,
                Some(child) => *child,
                None => break,
            };
            rest = after;
        }
        Some(module)
    }
}

fn parse(file: &Path, read: Read<'_>) -> Result<Vec<TokenTree>, String> {
    let tokens: TokenStream = read(file)?.parse().map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(without_tests(tokens))
}

/// The tokens without the items that only tests compile.
fn without_tests(tokens: TokenStream) -> Vec<TokenTree> {
    let (tokens, mut kept) = (tokens.into_iter().collect::<Vec<_>>(), vec![]);
    let mut rest = &tokens[..];
    while let Some((token, after)) = rest.split_first() {
        rest = match attribute(rest) {
            Some(attribute) if is_for_tests(&attribute) => after_item(&after[1..]),
            _ => {
                kept.push(match token {
                    TokenTree::Group(group) => {
                        let inner = without_tests(group.stream()).into_iter().collect();
                        proc_macro2::Group::new(group.delimiter(), inner).into()
                    }
                    _ => token.clone(),
                });
                after
            }
        };
    }
    kept
}

/// What stands in the brackets of an attribute that comes next.
fn attribute(tokens: &[TokenTree]) -> Option<TokenStream> {
    match tokens {
        [hash, TokenTree::Group(group), ..]
            if is_sign(hash, '#') && group.delimiter() == Delimiter::Bracket =>
        {
            Some(group.stream())
        }
        _ => None,
    }
}

/// `cfg(test)`, or `cfg(all(test, …))`.
fn is_for_tests(attribute: &TokenStream) -> bool {
    let mut words = words(attribute.clone()).into_iter();
    words.next().as_deref() == Some("cfg") && words.find(|word| word != "all").as_deref() == Some("test")
}

fn words(tokens: TokenStream) -> Vec<String> {
    let words = |token| match token {
        TokenTree::Ident(word) => vec![word.to_string()],
        TokenTree::Group(group) => words(group.stream()),
        _ => vec![],
    };
    tokens.into_iter().flat_map(words).collect()
}

/// What comes after an item: behind its semicolon, or its body.
fn after_item(mut tokens: &[TokenTree]) -> &[TokenTree] {
    while attribute(tokens).is_some() {
        tokens = &tokens[2..];
    }
    let is_use = tokens.iter().take(3).any(|token| is_word(token, "use"));
    let is_body =
        |token: &TokenTree| matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
    let last = tokens.iter().position(|token| is_sign(token, ';') || !is_use && is_body(token));
    last.map_or(&[], |last| &tokens[last + 1..])
}

/// Every path of two names or more, those in braces each with what stands before them.
fn paths(tokens: &[TokenTree]) -> Vec<Vec<String>> {
    let (mut paths, mut rest) = (vec![], tokens);
    while let Some((token, after)) = rest.split_first() {
        rest = match token {
            // `pub(in path)` imports nothing.
            TokenTree::Ident(word) if word == "pub" => match after {
                [TokenTree::Group(group), after @ ..] if group.delimiter() == Delimiter::Parenthesis => after,
                _ => after,
            },
            TokenTree::Ident(word) => path(vec![word.to_string()], after, &mut paths),
            TokenTree::Group(group) => {
                paths.append(&mut self::paths(&group.stream().into_iter().collect::<Vec<_>>()));
                after
            }
            // `::name` goes on with what is no path of ours: another crate, or a type.
            _ => match after_colons(rest) {
                Some([TokenTree::Ident(_), after @ ..]) => path(vec![], after, &mut vec![]),
                _ => after,
            },
        };
    }
    paths
}

/// Goes on with a path that began with `names`; returns what comes after it.
fn path<'a>(
    mut names: Vec<String>,
    mut tokens: &'a [TokenTree],
    paths: &mut Vec<Vec<String>>,
) -> &'a [TokenTree] {
    while let Some(after) = after_colons(tokens) {
        match after {
            [TokenTree::Ident(name), after @ ..] => {
                names.push(name.to_string());
                tokens = after;
            }
            [TokenTree::Group(group), after @ ..] => {
                braces(&names, &group.stream().into_iter().collect::<Vec<_>>(), paths);
                return after;
            }
            [star, after @ ..] if is_sign(star, '*') => {
                paths.push(names);
                return after;
            }
            _ => break,
        }
    }
    if names.len() > 1 {
        paths.push(names);
    }
    tokens
}

/// The paths of `{a, b::c, self, *}` behind `before`.
fn braces(before: &[String], tokens: &[TokenTree], paths: &mut Vec<Vec<String>>) {
    for tokens in tokens.split(|token| is_sign(token, ',')) {
        match tokens {
            [TokenTree::Ident(name), ..] if name == "self" => paths.push(before.to_vec()),
            [TokenTree::Ident(name), after @ ..] => {
                path([before, &[name.to_string()]].concat(), after, paths);
            }
            [_, ..] => paths.push(before.to_vec()),
            [] => {}
        }
    }
}

fn after_colons(tokens: &[TokenTree]) -> Option<&[TokenTree]> {
    match tokens {
        [first, second, after @ ..] if is_sign(first, ':') && is_sign(second, ':') => Some(after),
        _ => None,
    }
}

fn is_word(token: &TokenTree, word: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if ident == word)
}

fn is_sign(token: &TokenTree, sign: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The circles of a crate of these files, whose root is the first.
    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let read = |path: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| (*text).to_string()).ok_or(format!("there is no {}", path.display()))
        };
        let mut imports = Imports::default();
        imports.add_crate(Path::new(files[0].0), &read).unwrap();
        assert_eq!(imports.files(), files.len());
        imports.circles().iter().map(|circle| imports.line(circle)).collect()
    }

    #[test]
    fn files_that_import_in_one_direction_make_no_circle() {
        let files = [
            ("main.rs", "mod a; mod b; use self::a::f; fn main() { b::g(); f() }"),
            ("a.rs", "mod c; use std::fmt; use crate::b::{g, H}; pub fn f() { c::h() }"),
            ("b.rs", "pub fn g() {} pub(in crate::a) struct H;"),
            (
                "a/c.rs",
                "use super::super::b; /* crate::a::f */ const NAME: &str = \"crate::a::f()\"; // super::f",
            ),
        ];
        assert_eq!(circles(&files), [""; 0]);
    }

    #[test]
    fn two_files_that_import_each_other_are_a_circle() {
        let files = [
            ("src/lib.rs", "mod a; mod b;"),
            ("src/a.rs", "use crate::b::{self, G};"),
            ("src/b.rs", "fn g() -> Vec<crate::a::F> { vec![crate::a::f()] }"),
        ];
        assert_eq!(circles(&files), ["src/a.rs (crate::b) -> src/b.rs (crate::a::F) -> src/a.rs"]);
    }

    #[test]
    fn what_the_root_re_exports_is_imported_from_the_root() {
        let files = [
            ("lib.rs", "mod a; mod b; pub use a::F; pub use b::G;"),
            ("a.rs", "use crate::G;"),
            ("b.rs", ""),
        ];
        assert_eq!(circles(&files), ["a.rs (crate::G) -> lib.rs (a::F) -> a.rs"]);
        let files = [
            ("lib.rs", "mod a; mod b; mod c; pub use c::H;"),
            ("a.rs", "pub use crate::b::G;"),
            ("b.rs", "use crate::{H, c};"),
            ("c.rs", "use crate::a::G;"),
        ];
        let expected = [
            "a.rs (crate::b::G) -> b.rs (crate::c) -> c.rs (crate::a::G) -> a.rs",
            "b.rs (crate::H) -> lib.rs (c::H) -> c.rs (crate::a::G) -> a.rs (crate::b::G) -> b.rs",
        ];
        assert_eq!(circles(&files)[0], expected[0]);
        assert_eq!(circles(&files).len(), 2, "{:?}", circles(&files));
    }

    #[test]
    fn a_child_that_takes_from_its_parent_what_uses_it_is_a_circle() {
        let files = [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod b; const N: u32 = 1; fn f() { b::g() }"),
            ("a/b.rs", "mod c; use super::*; pub fn g() {}"),
            ("a/b/c.rs", "fn h() { super::super::N }"),
        ];
        assert_eq!(circles(&files), ["a/b.rs (super) -> a/mod.rs (b::g) -> a/b.rs"]);
    }

    #[test]
    fn a_module_in_a_file_belongs_to_the_file() {
        let files = [
            ("lib.rs", "mod a; mod b { mod inner { use super::super::a::F; use super::G; } pub struct G; }"),
            (
                "a.rs",
                "use crate::b::G; #[cfg(target_arch = \"x86_64\")] mod wide { use super::F; } pub struct F;",
            ),
        ];
        assert_eq!(circles(&files), ["a.rs (crate::b::G) -> lib.rs (super::super::a::F) -> a.rs"]);
    }

    #[test]
    fn what_only_tests_compile_imports_nothing() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            (
                "a.rs",
                "use crate::b::G;
                #[cfg(test)] mod tests;
                #[cfg(all(test, unix))] #[allow(dead_code)] pub(crate) mod more { use crate::b; }",
            ),
            (
                "b.rs",
                "#[cfg(test)] use crate::a::{F, H};
                #[cfg(test)] #[derive(Debug)] struct S { f: crate::a::F }
                impl G { #[cfg(test)] fn f() -> crate::a::F { F } fn g() {} }
                #[cfg(not(test))] fn h() {}",
            ),
        ];
        assert_eq!(circles(&files), [""; 0]);
        let files = [files[0], files[1], ("b.rs", "#[cfg(not(test))] fn h() { crate::a::f() }")];
        assert_eq!(circles(&files).len(), 1);
    }
}
