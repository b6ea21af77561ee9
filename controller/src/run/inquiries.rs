//! What HTTP asks the loop for.

use berth_protocol::join::JoinRequest;
use berth_protocol::tls::Party;

use super::{Daemon, RunError};
use crate::core::members::MemberChange;
use crate::core::{Actor, Event};
use crate::io::clock;
use crate::io::http::{Inquiry, NotInvited, Report};

impl Daemon {
    pub(super) async fn answer(&mut self, inquiry: Inquiry) -> Result<(), RunError> {
        // Whoever asked may have gone.
        match inquiry {
            Inquiry::Report(reply) => {
                let counters = self.controller.counters().clone();
                let (depot_bytes, depot_checkpoints) = self.depot.totals();
                let bus_up = self.bus.is_up();
                let _ = reply.send(Report { bus_up, counters, depot_bytes, depot_checkpoints });
            }
            Inquiry::Grant { node, asked, reply } => {
                let _ = reply.send(self.controller.grant(&node, &asked));
            }
            Inquiry::Invite { by, id, invitation, reply } => {
                let party = by.party.clone().unwrap_or(Party::Controller);
                let invited = match self.controller.may_invite(&party, &invitation.who) {
                    Err(why) => Err(why.into()),
                    Ok(()) if !self.controller.has_room_for_invitation() => Err(NotInvited::TooMany),
                    Ok(()) => Ok(()),
                };
                if invited.is_ok() {
                    self.change_members(by, MemberChange::Invited(id, invitation)).await?;
                }
                let _ = reply.send(invited);
            }
            Inquiry::Invitations(reply) => {
                let _ = reply.send(self.controller.invitations(clock::now()));
            }
            Inquiry::Join { from, request, reply } => {
                let joined = self.controller.may_join(clock::now(), &request);
                if let Ok(party) = joined.clone() {
                    let JoinRequest { id, key, .. } = *request;
                    let by = Actor { party: Some(party.clone()), from };
                    self.change_members(by, MemberChange::Joined { id, party, key }).await?;
                }
                let _ = reply.send(joined);
            }
            Inquiry::Uninvite { by, id, reply } => {
                let known = self.controller.is_invited(&id);
                if known {
                    self.change_members(by, MemberChange::Uninvited(id)).await?;
                }
                let _ = reply.send(known);
            }
            Inquiry::Remove { by, party, reply } => {
                let removed = self.controller.may_remove(&party);
                if removed.is_ok() {
                    self.change_members(by, MemberChange::Removed(party)).await?;
                }
                let _ = reply.send(removed);
            }
            Inquiry::Set { by, user, change, reply } => {
                let party = by.party.clone().unwrap_or(Party::Controller);
                let set = self.controller.may_set(&party, &user, &change);
                if set.is_ok() {
                    self.change_members(by, MemberChange::Set(user, change)).await?;
                }
                let _ = reply.send(set);
            }
            Inquiry::Secrets { namespace, reply } => {
                let _ = reply.send(self.controller.secrets(&namespace));
            }
            Inquiry::SecretsOf { node, pod, epoch, reply } => {
                let _ = reply.send(self.controller.secrets_of(&node, &pod, epoch));
            }
            Inquiry::SetSecret { by, secret, sealed, reply } => {
                let set = self.controller.may_set_secret(&secret.0, &secret.1, sealed.as_deref());
                if set.is_ok() {
                    self.step([Event::Secret(by, secret, sealed)]).await?;
                }
                let _ = reply.send(set);
            }
            Inquiry::Refused { by: actor, what, on, why } => {
                self.step([Event::Refused { actor, what, on, why }]).await?;
            }
            Inquiry::Import { imported, reply } => {
                self.step([Event::Imported(imported)]).await?;
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    /// Recorded first; then the doors know.
    async fn change_members(&mut self, by: Actor, change: MemberChange) -> Result<(), RunError> {
        let party = match &change {
            MemberChange::Joined { party, .. } | MemberChange::Removed(party) => Some(party.clone()),
            MemberChange::Set(user, _) => Some(Party::User(user.clone())),
            MemberChange::Invited(..) | MemberChange::Uninvited(_) => None,
        };
        let joins = matches!(change, MemberChange::Joined { .. });
        self.step([Event::Members(by, change)]).await?;
        if let (Some(party), Some(members)) = (party, &self.members) {
            let member = self.controller.members().get(&party).cloned();
            let what = match &member {
                None => "was removed from the cluster",
                Some(_) if joins => "has joined the cluster",
                Some(_) => "has other roles now",
            };
            tracing::info!("{party} {what}");
            members.set(party, member);
        }
        Ok(())
    }
}
