//! What names a model: a directory of this machine, or `hf://ORGANISATION/NAME[@REVISION]` on a hub.

use std::path::PathBuf;
use std::str::FromStr;

use crate::SourceError;

/// The revision where none is named.
pub const MAIN: &str = "main";

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Directory(PathBuf),
    Hub(Repository),
}

/// A repository of a hub, at a branch, a tag or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// `ORGANISATION/NAME`, or a name alone.
    pub id: String,
    pub revision: String,
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "hf://{}@{}", self.id, self.revision)
    }
}

impl FromStr for Address {
    type Err = SourceError;

    /// A path where there is no scheme.
    fn from_str(uri: &str) -> Result<Self, SourceError> {
        let invalid =
            |problem: &str| SourceError::Invalid { uri: uri.to_owned(), problem: problem.to_owned() };
        match uri.split_once("://") {
            None => Ok(Self::Directory(uri.into())),
            Some(("file", path)) => Ok(Self::Directory(path.into())),
            Some(("hf", rest)) => {
                let (id, revision) = rest.split_once('@').unwrap_or((rest, MAIN));
                let names: Vec<&str> = id.split('/').collect();
                if names.len() > 2 || !names.iter().all(|name| is_name(name)) {
                    return Err(invalid("not hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"));
                }
                if revision.is_empty() || revision.split('/').any(|part| !is_name(part)) {
                    return Err(invalid("what follows @ is no branch, tag or commit"));
                }
                Ok(Self::Hub(Repository { id: id.to_owned(), revision: revision.to_owned() }))
            }
            Some((scheme, _)) => Err(invalid(&format!("{scheme}:// is not known; file:// and hf:// are"))),
        }
    }
}

/// What a hub calls something: never a path that leads elsewhere, nothing that a URL would have to escape.
fn is_name(name: &str) -> bool {
    let is_common = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !name.is_empty() && name.len() <= 96 && name.bytes().all(is_common) && !name.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(uri: &str) -> Result<Address, String> {
        uri.parse().map_err(|error: SourceError| error.to_string())
    }

    #[test]
    fn a_path_is_a_directory_and_a_hubs_repository_is_at_main_or_where_it_says() {
        assert_eq!(read("models/x"), Ok(Address::Directory("models/x".into())));
        assert_eq!(read("file:///models/x"), Ok(Address::Directory("/models/x".into())));
        let hub =
            |id: &str, revision: &str| Address::Hub(Repository { id: id.into(), revision: revision.into() });
        assert_eq!(
            read("hf://deepseek-ai/DeepSeek-V2-Lite"),
            Ok(hub("deepseek-ai/DeepSeek-V2-Lite", "main"))
        );
        assert_eq!(read("hf://a/b@refs/pr/1"), Ok(hub("a/b", "refs/pr/1")));
        assert_eq!(read("hf://gpt2@v1.0"), Ok(hub("gpt2", "v1.0")));
    }

    #[test]
    fn what_names_no_repository_is_refused_with_what_would() {
        for uri in ["hf://", "hf://a/", "hf://a/b/c", "hf://a/..", "hf://a b/c", "hf://a/b?x"] {
            let told = read(uri).unwrap_err();
            assert_eq!(told, format!("{uri}: not hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"));
        }
        for uri in ["hf://a/b@", "hf://a/b@../x", "hf://a/b@x y"] {
            assert_eq!(read(uri).unwrap_err(), format!("{uri}: what follows @ is no branch, tag or commit"));
        }
        assert_eq!(read("ftp://a/b").unwrap_err(), "ftp://a/b: ftp:// is not known; file:// and hf:// are");
    }
}
